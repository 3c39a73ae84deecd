"""The one place that distrusts a client's reply. What passes here may touch the average."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import RefusedUpdate
from strategies.lora_names import LORA_A, LORA_B
from strategies.rule import Tensors


def admit(
    client: str,
    tensors: Mapping[str, Tensor],
    num_examples: object,
    expected: Mapping[str, Tensor],
    active: list[str],
    *,
    any_rank: bool,
) -> Tensors:
    """Check a reply and return its active tensors.

    Args:
        client: the client's name, for the reason of a refusal.
        tensors: what the reply holds; frozen tensors may be among them when they are byte-identical.
        num_examples: the reply's "num-examples".
        expected: every tensor as the client was to hold it at the start of the round.
        active: names of the tensors that the round trains.
        any_rank: whether a LoRA factor may have another rank than the expected one (not a larger one).

    Raises:
        RefusedUpdate: names the client, the tensor and what is allowed.
    """
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise RefusedUpdate(f"{client}: num-examples is {num_examples!r}; allowed: a whole number from 1")
    _check_names(client, tensors, expected, active)
    for name in tensors.keys() - set(active):
        if not _identical(tensors[name], expected[name]):
            raise RefusedUpdate(f"{client}: {name} is frozen in this round but came back changed")
    for name in active:
        _check_tensor(client, name, tensors[name], expected[name], any_rank)
    return {name: tensors[name] for name in active}


def _check_names(client: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], active: list[str]) -> None:
    for what, names in (
        ("missing", set(active) - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise RefusedUpdate(f"{client}: {len(names)} {what} tensor(s): {some}")


def _check_tensor(client: str, name: str, got: Tensor, want: Tensor, any_rank: bool) -> None:
    if got.dtype != want.dtype:
        raise RefusedUpdate(f"{client}: {name} is {got.dtype}, expected {want.dtype}")
    if not _shape_fits(name, got.shape, want.shape, any_rank):
        raise RefusedUpdate(f"{client}: {name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if got.is_floating_point():
        bad = got.numel() - int(torch.isfinite(got).sum())
        if bad:
            raise RefusedUpdate(f"{client}: {name}: {bad} non-finite values")


def _shape_fits(name: str, got: torch.Size, want: torch.Size, any_rank: bool) -> bool:
    if not any_rank or len(got) != 2:
        return got == want
    if name.endswith(LORA_A):  # (rank, in)
        return got[1] == want[1] and 1 <= got[0] <= want[0]
    if name.endswith(LORA_B):  # (out, rank)
        return got[0] == want[0] and 1 <= got[1] <= want[1]
    return got == want


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
