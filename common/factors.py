"""The change of a weight within a round in its exact low-rank factors, and how it travels.

GaLore's change of W within a round is W - W_0 = (c - 1) W_0 + sum_j P_j R_j: the product of all decays, and one term
for every basis that was used. A site sends (c, [P_1 P_2 ...], [R_1; R_2; ...]) where that is smaller than W; who
receives it makes W of it and of the W_0 that both hold. Nothing is approximated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import WireError

_DECAY, _LEFT, _RIGHT = "/decay", "/left", "/right"


@dataclass(frozen=True)
class Factors:
    """The exact change of one weight within a round: W = decay W_0 + sum_j left_j right_j.

    Attributes:
        decay: c, the product of all (1 - lr weight_decay).
        terms: pairs (left (m, r), right (r, n)) in float32, one for every basis used.
    """

    decay: float
    terms: list[tuple[Tensor, Tensor]]

    def apply(self, start: Tensor) -> Tensor:
        """The weight (m, n), in float32, that the factors make of ``start`` (m, n)."""
        weight = start.to(torch.float32) * self.decay
        for left, right in self.terms:
            weight.addmm_(left, right)
        return weight


def pack(name: str, factors: Factors, weight: Tensor) -> dict[str, Tensor]:
    """What travels for a weight, on the CPU.

    Returns:
        Its factors as ``name/decay`` (), ``name/left`` (m, R) and ``name/right`` (R, n); or ``weight`` (m, n) itself as
        ``name``, when the factors are not smaller.
    """
    rows, columns = weight.shape
    rank = sum(right.shape[0] for _, right in factors.terms)
    if 4 * rank * (rows + columns) >= weight.element_size() * rows * columns:
        return {name: weight.detach().cpu().clone()}
    lefts, rights = [left for left, _ in factors.terms], [right for _, right in factors.terms]
    return {
        name + _DECAY: torch.tensor(factors.decay, dtype=torch.float64),
        name + _LEFT: torch.cat([*lefts, weight.new_zeros(rows, 0, dtype=torch.float32)], dim=1).cpu(),
        name + _RIGHT: torch.cat([*rights, weight.new_zeros(0, columns, dtype=torch.float32)], dim=0).cpu(),
    }


def unpack(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Weights for all factors among ``tensors``; whatever else is there is left as it is.

    Args:
        tensors: what arrived.
        start: W_0 by name, as the sender had it.

    Returns:
        The tensors with float32 weights in place of factors, and the names of these weights.

    Raises:
        WireError: a factor is missing, or does not fit its weight.
    """
    result, named = dict(tensors), {name.removesuffix(_LEFT) for name in tensors if name.endswith(_LEFT)}
    for name in sorted(named & start.keys()):
        if name in tensors:
            raise WireError(f"{name} came both whole and in factors")
        try:
            decay, left, right = (result.pop(name + part) for part in (_DECAY, _LEFT, _RIGHT))
        except KeyError as missing:
            raise WireError(f"{name}: its factor {missing} is missing") from None
        if start[name].ndim != 2:
            raise WireError(f"{name}: shape {tuple(start[name].shape)} has no factors; send it whole")
        rows, columns = start[name].shape
        fits = left.ndim == right.ndim == 2 and left.shape == (rows, len(right)) and right.shape[1] == columns
        if not fits or len(right) > min(rows, columns) or decay.shape != ():
            shapes = ", ".join(str(tuple(part.shape)) for part in (left, right, decay))
            raise WireError(
                f"{name}: factors of shape {shapes} do not fit a weight of shape {(rows, columns)}; allowed: "
                f"({rows}, R), (R, {columns}), () with R up to {min(rows, columns)}"
            )
        if not (left.dtype == right.dtype == torch.float32 and math.isfinite(decay.item())):
            raise WireError(
                f"{name}: factors are {left.dtype}, {right.dtype}, decay {decay.item()}; allowed: float32, finite"
            )
        result[name] = Factors(float(decay), [(left, right)]).apply(start[name])
    return result, named & start.keys()
