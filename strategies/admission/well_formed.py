"""The one place that distrusts a client's reply: names, shapes, types and values are checked before aggregation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import DivergedUpdate, RefusedUpdate
from common.protocol import factors
from common.protocol.factors import Factors
from strategies.lora_names import LORA_A, partner
from strategies.rule import Tensors

_SLACK = 2  # so that a reply of another type, or a little too large, is refused for what it is
LARGEST = 1e12  # L2 norm of a tensor in a reply: the product of two such norms, or of one and an alpha, fits float32


def most_bytes(
    expected: Mapping[str, Tensor], *, in_factors: bool, any_rank: bool, max_rank: int | None
) -> dict[str, int]:
    """Most bytes of every tensor that a reply may hold, by name, so that no more than these are decoded.

    Args:
        expected: every tensor as the client was to hold it at the start of the round.
        in_factors: whether a change may come in factors.
        any_rank: see ``admit``.
        max_rank: see ``admit``.
    """
    most = factors.most_bytes(expected) if in_factors else {name: tensor.nbytes for name, tensor in expected.items()}
    for a in [name for name in expected if any_rank and name.endswith(LORA_A)]:
        b = str(partner(a))
        for name, side in ((a, expected[a].shape[1]), (b, expected[b].shape[0])):
            most[name] = _most_rank(expected[a], expected[b], max_rank) * side * expected[name].element_size()
    return {name: _SLACK * number for name, number in most.items()}


def admit(
    client: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    active: list[str],
    *,
    any_rank: bool = False,
    max_rank: int | None = None,
) -> Tensors:
    """Check a reply and return its active tensors.

    Args:
        client: the client's name, for the error's text.
        tensors: the reply's tensors; may include frozen tensors, if these are byte-identical to the expected ones.
        expected: every tensor that the client held at the start of the round, by name.
        active: names of the tensors that the round trains.
        any_rank: whether LoRA factors may have another rank than the expected ones.
        max_rank: the largest rank when ``any_rank``; None: the layer's smaller side.

    Raises:
        RefusedUpdate: names the client, the tensor and what is allowed.
    """
    _check_names(client, tensors, expected, active)
    for name in tensors.keys() - set(active):
        if not _identical(tensors[name], expected[name]):
            raise RefusedUpdate(f"{client}: {name} is frozen in this round but came back changed")
    for name in active:
        other = partner(name) if any_rank else None
        if other is None:
            _check_shape(client, name, tensors[name].shape, expected[name].shape)
        elif name.endswith(LORA_A):
            _check_ranks(client, (name, other), tensors, expected, max_rank)
        _check_values(client, name, tensors[name], expected[name])
    if any_rank:
        _check_one_rank(client, {name: tensors[name] for name in active if name.endswith(LORA_A)}, expected)
    return {name: tensors[name] for name in active}


def admit_factors(client: str, changes: Mapping[str, Factors]) -> None:
    """Check the values of changes that came in factors; ``unpack`` has checked the shapes.

    Raises:
        DivergedUpdate: a number is not finite, or a factor too large.
    """
    for name, change in changes.items():
        _check_size(client, name, [part for term in change.terms for part in term], " in its factors")


def _check_names(client: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], active: list[str]) -> None:
    for what, names in (
        ("missing", set(active) - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise RefusedUpdate(f"{client}: {len(names)} {what} tensor(s): {some}")


def _check_shape(client: str, name: str, got: torch.Size, want: torch.Size) -> None:
    if got != want:
        raise RefusedUpdate(f"{client}: {name} has shape {tuple(got)}, expected {tuple(want)}")


def _check_ranks(
    client: str, pair: tuple[str, str], got: Mapping[str, Tensor], want: Mapping[str, Tensor], max_rank: int | None
) -> None:
    """A (rank, in) and B (out, rank) of one layer: the same rank in both, from 1 to what is allowed."""
    a, b = pair
    (out, _), (_, in_) = want[b].shape, want[a].shape
    allowed = _most_rank(want[a], want[b], max_rank)
    rank = got[a].shape[0] if got[a].dim() == 2 else 1
    _check_shape(client, a, got[a].shape, torch.Size((rank, in_)))
    if not 1 <= rank <= allowed:
        raise RefusedUpdate(f"{client}: {a} has rank {rank}; allowed: 1 to {allowed}")
    _check_shape(client, b, got[b].shape, torch.Size((out, rank)))


def _most_rank(a: Tensor, b: Tensor, max_rank: int | None) -> int:
    """The largest rank of A (rank, in) and B (out, rank) of one layer."""
    return min(len(b), a.shape[1], max_rank or len(b))


def _check_one_rank(client: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """All layers of a client have one rank; a layer whose rank in the state is smaller may keep the state's rank."""
    rank = max((len(a) for a in got.values()), default=0)
    for name, a in got.items():
        if len(a) not in (rank, len(want[name])):
            raise RefusedUpdate(f"{client}: {name} has rank {len(a)}, others {rank}; allowed: one for all layers")


def _check_values(client: str, name: str, got: Tensor, want: Tensor) -> None:
    if got.dtype != want.dtype:
        raise RefusedUpdate(f"{client}: {name} is {got.dtype}, expected {want.dtype}")
    if got.is_floating_point():
        _check_size(client, name, [got])


def _check_size(client: str, name: str, parts: list[Tensor], where: str = "") -> None:
    """Values must be finite, and so small that the squares and products that aggregation makes of them are finite."""
    bad = sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
    if bad:
        raise DivergedUpdate(f"{client}: {name}: {bad} non-finite values{where}")
    largest = max((_norm(part) for part in parts), default=0.0)
    if largest > LARGEST:
        raise DivergedUpdate(f"{client}: {name}: a norm of {largest:.3g}{where}; allowed: up to {LARGEST:g}")


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
