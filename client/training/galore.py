"""GaLore (arXiv 2403.03507): Adam or SGD in a low-rank subspace of the gradient.

Every ``update_proj_gap`` steps a basis P is computed from a weight's gradient G (m, n). For m >= n P (r, n) holds the
leading right singular vectors, and R = G P^T (m, r); else P (m, r) holds the leading left singular vectors, and
R = P^T G (r, n). The inner optimizer works in R's shape; its step is projected back.

Differences from galore-torch: the basis comes from a warm-started randomized range finder (decision 021), or from the
caller, the same at all sites (decision 006). The change of a weight within a round is kept in exact float32 factors,
W = c W_0 + sum_j P_j R_j, so it can be sent at low rank, and a bfloat16 weight loses no small step (decision 005). A
gradient can be projected and freed during backward, and clipping uses the norm of the projected gradients, which does
not depend on when gradients are freed. The state holds only tensors and numbers (``weights_only=True`` loads it).

Tensors without a useful low rank, such as a classifier's new head, are trained unprojected: the inner optimizer takes
the gradient as it is, and the step is not scaled.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from client.training import changes
from client.training.common_basis import common_basis
from client.training.direct import directly, take
from client.training.inner import Inner, SecondMoments
from client.training.moments import Moments
from client.training.ranks import Ranks
from common.config.training import TrainingConfig
from common.errors import DivergedError, TrainingError
from common.linalg.subspace import generator_for, projects_right
from common.protocol.factors import Factors


class GaLore(torch.optim.Optimizer):
    """GaLore over named weight matrices.

    Args:
        params: the weights by name; all but the unprojected ones must be 2-D. The names seed the range finder and
            appear in errors.
        lr: learning rate.
        rank: r, at most the smaller side of every weight; None: nothing is projected.
        update_proj_gap: steps between two refreshes of the basis.
        scale: factor of the projected-back step (the paper's alpha).
        inner: "adamw", or "sgd" (plain, without momentum).
        betas: Adam's betas.
        eps: Adam's epsilon.
        weight_decay: decoupled, applied after the step.
        max_grad_norm: limit of the L2 norm of all projected gradients together; None for none.
        moments: number format of Adam's moments.
        basis: function from a weight's name and shape to its basis; None: bases come from the gradients.
        unprojected: names of the tensors that are trained without projection.
        second_moments: Adam's, to start with, for every projected weight; needs ``basis`` and float32 moments.
        refresh_batches: batches that the caller averages before ``refresh``; 1: the gradient of the next step.
        seed: seed of the range finder.

    Attributes:
        projected: names of the tensors that are projected.
        last_backward: the caller sets it to False while gradients are incomplete: more backward passes of the step
            follow, or other ranks have a part.
        ranks: the processes whose gradients are summed: projected in every step, complete for a new basis.
        layers: layers whose weights have no gradient made but for a new basis (``client.training.direct``).

    Raises:
        TrainingError: no weight would be projected, a weight is not 2-D, or the rank is above a weight's smaller side.

    Example:
        >>> weight, start = nn.Parameter(torch.eye(6, 4)), torch.eye(6, 4)
        >>> galore = GaLore({"w": weight}, lr=0.1, rank=2, update_proj_gap=200, scale=0.25)
        >>> with galore.projecting():  # gradients are projected and freed during backward
        ...     weight.square().sum().backward()
        >>> galore.step()
        >>> [(tuple(left.shape), tuple(right.shape)) for left, right in galore.factors("w").terms]
        [((6, 2), (2, 4))]
        >>> torch.allclose(galore.factors("w").apply(start), weight)
        True
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        lr: float,
        rank: int | None,
        update_proj_gap: int,
        scale: float,
        inner: Literal["adamw", "sgd"] = "adamw",
        betas: tuple[float, float] = TrainingConfig.betas,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        moments: Moments = "float32",
        basis: Callable[[str, torch.Size], Tensor] | None = None,
        unprojected: Collection[str] = (),
        second_moments: SecondMoments | None = None,
        refresh_batches: int = 1,
        seed: int = 0,
    ) -> None:
        projected = {n: p for n, p in params.items() if rank is not None and n not in unprojected}
        if not projected and rank is not None:
            raise TrainingError("GaLore has no weight to project; `modules` and `blocks` must select at least one")
        for name, parameter in projected.items():
            if parameter.ndim != 2:
                raise TrainingError(f"{name}: GaLore projects matrices, this has shape {tuple(parameter.shape)}")
            shape = tuple(parameter.shape)
            if rank is not None and not 1 <= rank <= min(shape):
                raise TrainingError(f"{name}: GaLore rank {rank}; allowed for shape {shape}: 1 to {min(shape)}")
        self._names = {parameter: name for name, parameter in params.items()}
        self.projected, self._projected = frozenset(projected), set(projected.values())
        self._seed = seed
        self._basis, self._max_norm = basis, max_grad_norm
        self._inner = Inner(moments, second_moments)
        self.refresh_batches = refresh_batches if basis is None else 1
        self.last_backward, self.ranks = True, Ranks([torch.device("cpu")])
        self.layers: list[nn.Linear] = []
        defaults: dict[str, Any] = {"lr": lr, "rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        defaults |= {"inner": inner, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(params.values()), defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one optimizer step, with the present gradients and those projected since the last step.

        Raises:
            DivergedError: a gradient is not finite; no weight was changed.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.last_backward = True
        for parameter in self._names:
            self._absorb(parameter)
        lows = [low for parameter in self._names if (low := self.state[parameter].get("low")) is not None]
        self.ranks.sum(lows)
        if lows:
            norm = float(nn.utils.get_total_norm(lows))  # a GPU is waited for once
            if not math.isfinite(norm):
                raise DivergedError(f"{self._not_finite()}: its gradient is not finite; lower training.learning_rate")
            if self._max_norm is not None and (factor := self._max_norm / (norm + 1e-6)) < 1:
                torch._foreach_mul_(lows, factor)
        for group in self.param_groups:
            for parameter in group["params"]:
                if "low" in self.state[parameter]:
                    self._update(parameter, group)
        return loss

    @contextmanager
    def projecting(self) -> Iterator[None]:
        """A context in which every gradient is projected and freed during backward, as soon as it is complete.

        Exception: in a refresh step with several backward passes, gradients are kept to the end of the step.
        """
        handles = [p.register_post_accumulate_grad_hook(self._absorb) for p in self._names]
        try:
            mine = [layer for layer in self.layers if layer.weight in self._projected and not self._due(layer.weight)]
            with directly(mine, self.state):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def refresh_due(self) -> bool:
        """Whether the next step needs new bases."""
        return any(self._due(parameter) for parameter in self._projected)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute new bases from the present gradients, then free all gradients.

        Raises:
            DivergedError: a gradient is not finite.
        """
        for parameter in self._names:
            if parameter.grad is not None and parameter in self._projected:
                self._take_basis(parameter, self._state_of(parameter), parameter.grad.to(torch.float32))
            parameter.grad = None

    @torch.no_grad()
    def _absorb(self, parameter: nn.Parameter) -> None:
        """Project a gradient and free it."""
        if parameter.grad is None:
            return
        due = self._due(parameter)
        if due and self._basis is None and not self.last_backward:
            return
        state = self._state_of(parameter)
        low = gradient = parameter.grad.to(torch.float32)
        if due:
            self._take_basis(parameter, state, gradient)
        if parameter in self._projected:
            basis = state["bases"][-1]
            low = gradient @ basis.T if projects_right(gradient.shape) else basis.T @ gradient  # (m, r) or (r, n)
        take(state, low)
        parameter.grad = None

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            projected = parameter in self._projected
            new = {"step": 0, "refreshed": -1, **changes.begun(parameter, projected=projected)}
            if projected:
                self._inner.begin(new, self._names[parameter], parameter, self.defaults)
            state.update(new)  # last, because the lines before may run out of memory: no half-filled state
        return state

    def _due(self, parameter: Tensor) -> bool:
        if parameter not in self._projected:
            return False
        state = self.state[parameter]
        if not state or not state["bases"]:
            return True
        gap = self.defaults["update_proj_gap"]
        return self._basis is None and state["step"] % gap == 0 and state["refreshed"] != state["step"]

    def _not_finite(self) -> str:
        """Name of a weight whose projected gradient is not finite."""
        return next(n for p, n in self._names.items() if not torch.isfinite(self.state[p]["low"]).all())

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, projected = self.state[parameter], parameter in self._projected
        state["step"] += 1
        change = self._inner.change(state, state.pop("low"), group, group["scale"] if projected else 1.0)
        changes.add(state, parameter, change, 1.0 - group["lr"] * group["weight_decay"], projected=projected)

    def _take_basis(self, parameter: nn.Parameter, state: dict[str, Any], gradient: Tensor) -> None:
        """Set a new basis, from ``gradient`` (m, n; summed in place) or the shared one, and open a new term."""
        name, rank = self._names[parameter], self.defaults["rank"]
        if self._basis is not None:
            basis: Tensor | None = self._basis(name, gradient.shape).to(gradient.device)
        else:
            last = state["bases"][-1] if state["bases"] else None
            basis = common_basis(self.ranks, gradient, rank, last, generator_for(self._seed, name, state["step"]))
        if basis is None:
            raise DivergedError(f"{name}: its gradient is not finite; lower training.learning_rate")
        changes.open_term(state, basis, gradient.shape)
        state["refreshed"] = state["step"]

    def factors(self, name: str) -> Factors:
        """The exact change of a projected weight since the optimizer was built.

        Raises:
            KeyError: no weight of this name.
        """
        parameter, state = self._of(name)
        if self._basis is not None and not state.get("bases"):  # without a gradient there was no step: send R = 0
            state = {"decay": state.get("decay", 1.0), "bases": [], "updates": []}
            changes.open_term(state, self._basis(name, parameter.shape), parameter.shape)
        return changes.factors(state, parameter.shape, common=self._basis is not None)

    def whole(self, name: str, start: Tensor) -> Tensor:
        """An unprojected tensor's value, in float32, if it was ``start`` (same shape) at the start of the round.

        Raises:
            KeyError: no tensor of this name.
        """
        _, state = self._of(name)
        return changes.whole(state, start) if state else start.to(torch.float32)

    def second_moment(self, name: str) -> Tensor:
        """Adam's second moment of a projected weight in the form to send: (longer side,), bias-corrected, on the CPU.

        Raises:
            KeyError: no weight of this name.
        """
        parameter, state = self._of(name)
        return self._inner.second_moment(state, name, parameter.shape, self.defaults)

    def _of(self, name: str) -> tuple[nn.Parameter, dict[str, Any]]:
        parameter = {n: p for p, n in self._names.items()}[name]
        return parameter, self.state[parameter]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients, also those that are projected already."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop("low", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but float32 state stays float32 beside a bfloat16 weight."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            saved = state_dict["state"].get(index)
            if saved is not None:
                self.state[parameter] = {key: _to(value, parameter.device) for key, value in saved.items()}


def _to(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - tensors, lists of tensors and numbers
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value.clone().to(device) if isinstance(value, Tensor) else value
