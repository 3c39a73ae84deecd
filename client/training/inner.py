"""The inner optimizer of GaLore: Adam or SGD on a projected gradient, or on an unprojected one.

It keeps its data about a weight in the weight's state, a dictionary of tensors and numbers.
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
    """Second moments to start with (see ``common.model.second_moments``).

    Attributes:
        tensors: moments by name, (longer side,) of the weight, bias-corrected; all zeros: none yet.
        steps: number of steps that count as done before.
    """

    tensors: Mapping[str, Tensor]
    steps: int


class Inner:
    """Computes the steps.

    Args:
        moments: number format of Adam's moments.
        known: second moments to start with; None: start with zeros.
    """

    def __init__(self, moments: Moments, known: SecondMoments | None) -> None:
        self._moments, self._known = moment_store(moments), known

    def begin(self, state: dict[str, Any], name: str, weight: Tensor, group: Mapping[str, Any]) -> None:
        """Initialise Adam's state of a projected weight (m, n) from the known second moments."""
        if self._known is None:
            return
        moment = self._known.tensors[name_of(name)].to(weight.device)
        if moment.any():
            square = spread(moment, weight.shape, group["rank"])
            square.mul_(1 - group["betas"][1] ** self._known.steps)
            self._moments.save(state, torch.zeros_like(square), square)
            state["before"] = self._known.steps

    def change(self, state: dict[str, Any], low: Tensor, group: Mapping[str, Any], scale: float) -> Tensor:
        """The step for a gradient (m, r) or (r, n): same shape, float32, with sign and learning rate."""
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
        """Adam's second moment of a projected weight in the form to send; see ``GaLore.second_moment``."""
        assert self._known is not None  # noqa: S101 - only called with known moments
        if not state or not state["step"]:  # it got no gradient
            return self._known.tensors[name_of(name)]
        return gathered(state["exp_avg_sq"], shape).div_(1 - group["betas"][1] ** _steps(state)).cpu()


def _steps(state: Mapping[str, Any]) -> int:
    """Number of steps that the second moment was averaged over."""
    return int(state["step"]) + int(state.get("before", 0))
