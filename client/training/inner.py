"""The inner optimizer of GaLore: Adam or SGD on a gradient in its subspace, or on a whole one.

All that it knows of a weight is in the weight's state, a dictionary of tensors and numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from client.training.moments import Moments, moment_store
from common.model.second_moments import gathered, name_of, spread


@dataclass(frozen=True)
class SecondMoments:
    """Second moments to begin with (see ``common.model.second_moments``).

    Attributes:
        tensors: by name, (longer side,) of a weight, corrected for the bias; all zero: none yet.
        steps: that count as done before.
    """

    tensors: Mapping[str, Tensor]
    steps: int


class Inner:
    """Makes the steps.

    Args:
        moments: how Adam's two are kept.
        known: second moments to begin with; None: they begin with zero.
    """

    def __init__(self, moments: Moments, known: SecondMoments | None) -> None:
        self._moments, self._known = moment_store(moments), known

    def begin(self, state: dict[str, Any], name: str, weight: Tensor, group: Mapping[str, Any]) -> None:
        """Have Adam go on from the second moments of a projected weight that are known."""
        if self._known is None:
            return
        moment = self._known.tensors[name_of(name)].to(weight.device)
        if moment.any():
            square = spread(moment, weight.shape, group["rank"])
            square.mul_(1 - group["betas"][1] ** self._known.steps)
            self._moments.save(state, torch.zeros_like(square), square)
            state["before"] = self._known.steps

    def change(self, state: dict[str, Any], low: Tensor, group: Mapping[str, Any], scale: float) -> Tensor:
        """The change that a gradient (m, r) or (r, n) makes: of its shape, float32, sign and learning rate included."""
        if group["inner"] == "sgd":
            return low.mul_(-group["lr"] * scale)
        beta1, beta2 = group["betas"]
        mean, square = self._moments.load(state, low)
        mean.lerp_(low, 1 - beta1)
        square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        self._moments.save(state, mean, square)
        correction = (1 - beta2 ** _steps(state)) ** 0.5 / (1 - beta1 ** state["step"])
        normalised: Tensor = mean / square.sqrt().add_(group["eps"])
        return normalised.mul_(-group["lr"] * correction * scale)

    def second_moment(self, state: Mapping[str, Any], name: str, shape: Size, group: Mapping[str, Any]) -> Tensor:
        """Adam's second moment of a projected weight as it travels; see ``GaLore.second_moment``."""
        assert self._known is not None  # noqa: S101 - nobody asks without
        if not state or not state["step"]:  # it got no gradient
            return self._known.tensors[name_of(name)]
        return gathered(state["exp_avg_sq"], shape).div_(1 - group["betas"][1] ** _steps(state)).cpu()


def _steps(state: Mapping[str, Any]) -> int:
    """That the second moment is of."""
    return int(state["step"]) + int(state.get("before", 0))
