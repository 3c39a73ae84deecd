"""The change of a weight within a round as exact low-rank factors, and the form in which factors are sent.

GaLore's change of W within a round is W - W_0 = (c - 1) W_0 + sum_j P_j R_j: c is the product of all decays, and each
basis used gives one term. The sender sends (c, [P_1 P_2 ...], [R_1; R_2; ...]) where these are smaller than W; the
receiver computes W from the factors and from W_0, which both hold. In float32 nothing is approximated. Where all sites
share the round's basis (``common.linalg.subspace``), only R is sent (decisions 005, 006).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from common.errors import WireError
from common.linalg.gram import gram
from common.linalg.remembered import square_norm, times_left, times_right
from common.linalg.subspace import SharedBasis, projects_right, shared_basis

Precision = Literal["float32", "bfloat16", "int8"]
Shape = tuple[int, ...]
_DECAY, _LEFT, _RIGHT, _SCALE = "/decay", "/left", "/right", "-scale"
_LONG = {_LEFT: 0, _RIGHT: 1}  # the dimension that a factor shares with the weight; the other counts directions
_DECAY_BYTES = 8
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Factors:
    """The change of one weight within a round: W = decay W_0 + sum_j left_j right_j.

    Attributes:
        decay: c, the product of all (1 - lr weight_decay).
        terms: pairs (left (m, r), right (r, n)) in float32, one for every basis used.
        common: whether the basis of the only term is the one that all sites share in this round.
    """

    decay: float
    terms: list[tuple[Tensor, Tensor]]
    common: bool = False

    def apply(self, start: Tensor) -> Tensor:
        """W (m, n), in float32, from W_0 = ``start`` (m, n)."""
        return self._add_terms(start.to(torch.float32) * self.decay)

    def square(self, start: Tensor, inner: float | None = None) -> float:
        """Squared Frobenius norm of the change; without decay computed from the factors alone.

        Args:
            start: W_0 (m, n).
            inner: ``self.inner(start)``, where it is known; used with decay only.
        """
        left, right = self.stacked(tuple(start.shape))
        square, shrunk = float((gram(left).double() * gram(right.T).double()).sum()), self.decay - 1.0
        if shrunk:
            square += 2 * shrunk * (self.inner(start) if inner is None else inner)
            square += shrunk * shrunk * square_norm(start)  # ** would raise OverflowError; * gives inf
        return max(square, 0.0)

    def inner(self, start: Tensor) -> float:
        """Inner product of W_0 and the terms; W_0 times a basis that all sites share is computed once a round."""
        if not self.terms:
            return 0.0
        if self.common and projects_right(start.shape):
            return float((times_right(start, self.terms[0][1]) * self.terms[0][0]).sum(dtype=torch.float64))
        if self.common:
            return float((times_left(start, self.terms[0][0]) * self.terms[0][1]).sum(dtype=torch.float64))
        return inner_products([self], start)[0]

    def change(self, start: Tensor) -> Tensor:
        """W - W_0 (m, n), in float32, for W_0 = ``start`` (m, n)."""
        return self._add_terms(start.to(torch.float32) * (self.decay - 1.0))

    def scaled(self, shape: Shape, factor: float) -> "Factors":
        """The change multiplied by ``factor``; bases stay as they are, the other factors are scaled."""
        right = projects_right(shape)
        terms = [(a * factor, b) if right else (a, b * factor) for a, b in self.terms]
        return Factors(1.0 + factor * (self.decay - 1.0), terms, self.common)

    def stacked(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """[left_1 left_2 ...] (m, R) and [right_1; right_2; ...] (R, n), on the CPU."""
        if len(self.terms) == 1:
            return self.terms[0][0].cpu(), self.terms[0][1].cpu()
        lefts, rights = [left.cpu() for left, _ in self.terms], [right.cpu() for _, right in self.terms]
        return torch.cat([*lefts, torch.zeros(shape[0], 0)], 1), torch.cat([*rights, torch.zeros(0, shape[1])], 0)

    def _add_terms(self, weight: Tensor) -> Tensor:
        """Add all terms to the weight (m, n): first to each other, so that the much larger weight is rounded once."""
        products = [left.to(weight.device) @ right.to(weight.device) for left, right in self.terms]
        for product in products[1:]:
            products[0].add_(product)
        return weight.add_(products[0]) if products else weight


def inner_products(changes: Sequence[Factors], start: Tensor) -> list[float]:
    """``Factors.inner`` of each change, by one product with W_0 (m, n)."""
    stacked = Factors(1.0, [pair for change in changes for pair in change.terms])
    left, right = stacked.stacked(tuple(start.shape))
    columns = ((start.to(torch.float32) @ right.T) * left).sum(0, dtype=torch.float64)
    widths = [sum(one.shape[0] for _, one in change.terms) for change in changes]
    return [float(part.sum()) for part in columns.split(widths)]


@dataclass(frozen=True)
class Exchange:
    """The form in which a round's factors are sent; sender and receiver must use the same.

    Attributes:
        precision: number format of every factor.
        basis: the round's shared basis; None: every sender has its own basis and sends it.

    Example:
        >>> start = torch.ones(4, 3)
        >>> change = Factors(1.0, [(torch.full((4, 1), 0.5), torch.ones(1, 3))])  # rank 1: adds 0.5 everywhere
        >>> sent = pack("w", change, start, Exchange())
        >>> {name: tuple(tensor.shape) for name, tensor in sent.items()}
        {'w/decay': (), 'w/left': (4, 1), 'w/right': (1, 3)}
        >>> dense, factors = unpack(sent, {"w": (4, 3)}, Exchange())
        >>> torch.equal(factors["w"].apply(start), start + 0.5)
        True
    """

    precision: Precision = "float32"
    basis: SharedBasis | None = None

    @classmethod
    def of_round(cls, server_round: int, precision: Precision, shared: tuple[int, int] | None) -> "Exchange":
        """The form for ``server_round``; ``shared``: seed and rank of the shared bases, None for own bases."""
        return cls(precision, None if shared is None else shared_basis(shared[0], server_round, shared[1]))


def pack(name: str, factors: Factors, start: Tensor, exchange: Exchange) -> dict[str, Tensor]:
    """Make the tensors to send for a weight, on the CPU.

    Args:
        name: the weight's name.
        factors: the weight's change.
        start: W_0 (m, n), the weight before the change.
        exchange: the form in which factors are sent.

    Returns:
        ``name/decay`` (), ``name/left`` (m, R) and ``name/right`` (R, n), without the shared basis if there is one;
        int8 factors have one scale per direction (``name/left-scale`` (1, R), ``name/right-scale`` (R, 1)). Or the
        dense weight (m, n) in float32 as ``name``, when the factors are not smaller, or R is above min(m, n).
    """
    sent = _stored(factors, start.shape, exchange)
    if sent is None:
        return {name: factors.apply(start).cpu()}
    parts = {_DECAY: torch.tensor(factors.decay, dtype=torch.float64), **sent}
    return {name + part: tensor for part, tensor in parts.items()}


def unpack(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], exchange: Exchange, *, any_basis: bool = False
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """Split received tensors into dense tensors and changes in factors: the inverse of ``pack``.

    Args:
        tensors: the received tensors by name.
        shapes: shapes, by name, of the weights that may come in factors.
        exchange: the form in which factors are sent.
        any_basis: whether a change may come with bases of its own although there is a shared one; see ``Step``.

    Raises:
        WireError: a factor is missing, not allowed, or does not match the weight's shape.
    """
    whole, made = dict(tensors), {}
    for name, shape in shapes.items():
        known = (_DECAY, *_LONG, *(part + _SCALE for part in _LONG))
        parts = {part: whole.pop(name + part) for part in known if name + part in whole}
        if parts and name in whole:
            raise WireError(f"{name} came both whole and in factors")
        if parts and len(shape) != 2:
            raise WireError(f"{name}: shape {tuple(shape)} has no factors; send it whole")
        if parts:
            own = any_basis and common_part(tuple(shape)) in parts
            made[name] = _factors(name, parts, tuple(shape), replace(exchange, basis=None) if own else exchange)
    return whole, made


def most_bytes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Upper limit of bytes for every tensor name that ``unpack`` accepts for a state: dense tensors and factors."""
    most = {name: tensor.nbytes for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            (rows, columns), rank = tensor.shape, min(tensor.shape)
            parts = {_DECAY: _DECAY_BYTES, _LEFT: 4 * rows * rank, _RIGHT: 4 * rank * columns}
            most |= {name + part: size for part, size in parts.items()}
            most |= {name + part + _SCALE: 4 * rank for part in _LONG}
    return most


def rounding_error(factors: Mapping[str, Factors], shapes: Mapping[str, Shape], exchange: Exchange) -> float:
    """Relative error (Frobenius norm) of the changes sum_j left_j right_j after rounding to ``exchange.precision``."""
    lost = total = 0.0
    for name, exact in factors.items():
        left, right = exact.stacked(shapes[name])
        sent = _stored(exact, shapes[name], exchange)
        product = left @ right
        if sent is not None:
            rounded = _loaded(sent, _LEFT, left) @ _loaded(sent, _RIGHT, right)
            lost += float((rounded - product).square().sum(dtype=torch.float64))
        total += float(product.square().sum(dtype=torch.float64))
    return math.sqrt(lost / total) if total > 0 else 0.0


def packed_bytes(shape: Shape, directions: int, exchange: Exchange) -> int:
    """Most bytes that ``pack`` makes of the change of such a weight, in so many directions, of all terms together."""
    directions = min(directions, min(shape) + 1)
    pair = (torch.zeros(shape[0], directions), torch.zeros(directions, shape[1]))
    sent = _stored(Factors(1.0, [pair], common=exchange.basis is not None), tuple(shape), exchange)
    return 4 * math.prod(shape) if sent is None else num_bytes(sent.values()) + _DECAY_BYTES


def in_factors(shape: Shape, exchange: Exchange) -> bool:
    """Whether a change in the round's shared basis is sent in factors; else it is dense, or has its own basis."""
    if exchange.basis is None or len(shape) != 2:
        return False
    rank = exchange.basis.rank
    pair = (torch.zeros(shape[0], rank), torch.zeros(rank, shape[1]))
    return _stored(Factors(1.0, [pair], common=True), shape, exchange) is not None


def parts_of(shape: Shape) -> tuple[str, str]:
    """Ends of the names under which a change in the shared basis travels: the projected change, the decay."""
    return next(part for part in _LONG if part != common_part(shape)), _DECAY


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum of the tensors' sizes, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored(factors: Factors, shape: Shape, exchange: Exchange) -> dict[str, Tensor] | None:
    """The stacked factors in the form to send; None when the dense weight is to be sent."""
    result = {}
    if sum(left.shape[1] for left, _ in factors.terms) > min(shape):  # int8 factors may be smaller still: not worth it
        return None
    for part, factor in zip(_LONG, factors.stacked(shape), strict=True):
        if factors.common and part == common_part(shape):
            continue
        if exchange.precision == "int8":
            largest = factor.abs().amax(_LONG[part], keepdim=True)
            result[part + _SCALE] = scale = torch.where(largest > 0, largest, 1.0) / 127
            factor = (factor / scale).round()
        result[part] = factor.to(_DTYPES[exchange.precision]).contiguous()
    return result if num_bytes(result.values()) + _DECAY_BYTES < 4 * math.prod(shape) else None


def _loaded(parts: Mapping[str, Tensor], part: str, common: Tensor) -> Tensor:
    """A received factor in float32; ``common``, the shared basis, when the factor was not sent."""
    if part not in parts:
        return common
    factor = parts[part].to(torch.float32)
    return factor * parts[part + _SCALE] if part + _SCALE in parts else factor


def common_part(shape: Shape) -> str:
    """The part, left or right, that is the basis of a weight of this shape."""
    return _RIGHT if projects_right(shape) else _LEFT


def _factors(name: str, parts: Mapping[str, Tensor], shape: Shape, exchange: Exchange) -> Factors:
    """Check the received parts of one weight and make ``Factors`` of them."""
    travelling = [part for part in _LONG if exchange.basis is None or part != common_part(shape)]
    scales = [part + _SCALE for part in travelling] if exchange.precision == "int8" else []
    expected = (_DECAY, *travelling, *scales)
    for what, some in (("is missing", set(expected) - parts.keys()), ("was not to come", parts.keys() - set(expected))):
        if some:
            allowed = ", ".join(f"{name}{part}" for part in expected)
            raise WireError(f"{name}: its factor '{name}{min(some)}' {what}; allowed in this federation: {allowed}")
    any_part = parts[travelling[0]]
    rank = exchange.basis.rank if exchange.basis is not None else any_part.shape[1] if any_part.ndim == 2 else -1
    shapes = {_DECAY: (), _LEFT: (shape[0], rank), _RIGHT: (rank, shape[1])}
    shapes |= {_LEFT + _SCALE: (1, rank), _RIGHT + _SCALE: (rank, 1)}
    dtypes = {part: _DTYPES[exchange.precision] if part in _LONG else torch.float32 for part in shapes}
    dtypes[_DECAY] = torch.float64
    if rank > min(shape) or any(parts[part].shape != shapes[part] for part in expected):
        came = ", ".join(str(tuple(parts[part].shape)) for part in expected)
        form = {_LEFT: f"({shape[0]}, R)", _RIGHT: f"(R, {shape[1]})", _DECAY: "()"}
        form |= {_LEFT + _SCALE: "(1, R)", _RIGHT + _SCALE: "(R, 1)"}
        fits = ", ".join(form[part] for part in expected)
        raise WireError(
            f"{name}: factors of shape {came} do not fit a weight of shape {shape}; allowed: {fits} with R up to "
            f"{exchange.basis.rank if exchange.basis is not None else min(shape)}"
        )
    for part in expected:
        if parts[part].dtype != dtypes[part]:
            raise WireError(f"{name}: '{name}{part}' is {parts[part].dtype}; allowed: {dtypes[part]}")
    decay = parts[_DECAY].item()
    if not math.isfinite(decay):
        raise WireError(f"{name}: decay is {decay}; allowed: a finite number")
    basis = exchange.basis(name, shape) if exchange.basis is not None else any_part
    pair = (_loaded(parts, _LEFT, basis), _loaded(parts, _RIGHT, basis))
    return Factors(float(decay), [pair], common=exchange.basis is not None)
