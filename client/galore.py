"""GaLore (arXiv 2403.03507): Adam or SGD in a low-rank subspace of the gradient.

For a gradient G (m, n) every ``update_proj_gap`` steps a basis P is taken from G: for m >= n of its right singular
vectors, P (r, n) and R = G P^T (m, r); else of its left ones, P (m, r) and R = P^T G (r, n). The inner optimizer runs
in R's shape, its step is projected back.

Three differences from galore-torch: the basis comes from a randomized range finder that is warm-started with the last
basis (a federation refreshes in every round, so a full SVD per refresh would be most of the work); the change of a
weight within a round is kept in its exact factors, W = c W_0 + sum_j P_j R_j (float32), so it can travel at low rank
and a bfloat16 weight loses no small step; the state holds only tensors and numbers, so it loads with
``weights_only=True``.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from common.errors import TrainingError
from common.factors import Factors

_OVERSAMPLING = 8
_MOST_ITERATIONS = 12
_CONVERGED = 1e-3  # an iteration that adds less than this share of the captured energy is the last


class GaLore(torch.optim.Optimizer):
    """GaLore over named weight matrices.

    Args:
        params: the weights by name, each 2-D; the names seed the range finder and appear in errors.
        lr: learning rate.
        rank: r, at most the smaller side of every weight.
        update_proj_gap: steps between two refreshes of the basis.
        scale: factor of the projected-back step (the paper's alpha).
        inner: "adamw", or "sgd" (plain, without momentum).
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled, applied after the step.
        seed: of the range finder.

    Raises:
        TrainingError: no weight would be projected, a weight is not 2-D, or the rank is above a weight's smaller side.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        lr: float,
        rank: int,
        update_proj_gap: int,
        scale: float,
        inner: Literal["adamw", "sgd"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not params:
            raise TrainingError("GaLore has no weight to project; `modules` and `blocks` must select at least one")
        for name, parameter in params.items():
            if parameter.ndim != 2:
                raise TrainingError(f"{name}: GaLore projects matrices, this has shape {tuple(parameter.shape)}")
            if not 1 <= rank <= min(parameter.shape):
                shape = tuple(parameter.shape)
                raise TrainingError(f"{name}: GaLore rank {rank}; allowed for shape {shape}: 1 to {min(shape)}")
        self._names = {parameter: name for name, parameter in params.items()}
        self._seed = seed
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "inner": inner,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(list(params.values()), defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimizer step.

        Raises:
            TrainingError: a gradient is not finite; no weight is changed by it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient = parameter.grad.to(torch.float32)  # type: ignore[union-attr]
        if not state:
            _begin(state, parameter)
        if state["step"] % group["update_proj_gap"] == 0:
            self._refresh(parameter, gradient, group["rank"])
        basis = state["bases"][-1]
        right = gradient.shape[0] >= gradient.shape[1]
        low = gradient @ basis.T if right else basis.T @ gradient  # (m, r) or (r, n)
        state["step"] += 1
        change = self._inner_step(state, low, group)
        state["updates"][-1].add_(change)
        kept = 1.0 - group["lr"] * group["weight_decay"]
        if kept != 1.0:
            state["decay"] *= kept
            for update in state["updates"]:
                update.mul_(kept)
        if "start" in state:  # a low-precision weight: materialised from its float32 factors, so no small step is lost
            parameter.copy_(self.factors(self._names[parameter]).apply(state["start"]))
        else:
            if right:
                parameter.addmm_(change, basis)
            else:
                parameter.addmm_(basis, change)
            if kept != 1.0:
                parameter.mul_(kept)

    def _inner_step(self, state: dict[str, Any], low: Tensor, group: dict[str, Any]) -> Tensor:
        """The change in the subspace: (m, r) or (r, n), float32, sign and learning rate included."""
        if group["inner"] == "sgd":
            return low.mul_(-group["lr"] * group["scale"])
        beta1, beta2 = group["betas"]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["exp_avg"].lerp_(low, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
        correction = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        normalised: Tensor = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        return normalised.mul_(-group["lr"] * correction * group["scale"])

    def _refresh(self, parameter: nn.Parameter, gradient: Tensor, rank: int) -> None:
        """Take a new basis from ``gradient`` and open a new term of the factors."""
        state, name = self.state[parameter], self._names[parameter]
        if not torch.isfinite(gradient).all():
            raise TrainingError(f"{name}: its gradient is not finite; lower training.learning_rate")
        right = gradient.shape[0] >= gradient.shape[1]
        tall = gradient if right else gradient.T  # (rows, short side)
        last = state["bases"][-1] if state["bases"] else None
        warm = None if last is None else (last.T if right else last)
        vectors = range_finder(tall, rank, warm, self._generator(name, state["step"]))  # (short side, r)
        basis = vectors.T.contiguous() if right else vectors
        rows, columns = gradient.shape
        shape = (rows, rank) if right else (rank, columns)
        state["bases"].append(basis)
        state["updates"].append(torch.zeros(shape, dtype=torch.float32, device=gradient.device))

    def _generator(self, name: str, step: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}/{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def factors(self, name: str) -> Factors:
        """The exact change of a weight since the optimizer was built or ``start_round`` was called.

        Raises:
            KeyError: no weight of this name.
        """
        parameter = {n: p for p, n in self._names.items()}[name]
        state = self.state[parameter]
        if not state:
            return Factors(1.0, [])
        right = parameter.shape[0] >= parameter.shape[1]
        pairs = zip(state["updates"], state["bases"], strict=True)
        terms = [(update, basis) if right else (basis, update) for update, basis in pairs]
        return Factors(state["decay"], terms)

    def start_round(self) -> None:
        """Take the weights as they are now as W_0; moments and the current basis live on, the step count too."""
        for parameter, state in self.state.items():
            if state:
                state["bases"], state["updates"] = state["bases"][-1:], [torch.zeros_like(state["updates"][-1])]
                state["decay"] = 1.0
                if "start" in state:
                    state["start"] = parameter.detach().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but float32 state stays float32 beside a bfloat16 weight."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            saved = state_dict["state"].get(index)
            if saved is not None:
                self.state[parameter] = {key: _to(value, parameter.device) for key, value in saved.items()}


def range_finder(matrix: Tensor, rank: int, warm: Tensor | None, generator: torch.Generator) -> Tensor:
    """Approximate top right singular vectors by randomized subspace iteration (arXiv 0909.4061, algorithm 4.4).

    Args:
        matrix: (rows, n) with n <= rows, float32, finite.
        rank: how many vectors.
        warm: (n, any) a guess that the search starts from, besides random directions; None for none.
        generator: of the random directions, on the CPU, so that every device draws the same.

    Returns:
        (n, rank) orthonormal columns, in falling order of captured energy, the largest entry of each positive.
    """
    n = matrix.shape[1]
    width = min(n, rank + _OVERSAMPLING)
    have = 0 if warm is None else min(warm.shape[1], rank)
    fresh = torch.randn(n, width - have, generator=generator).to(matrix)
    start = fresh if warm is None else torch.cat([warm[:, :have], fresh], dim=1)
    q: Tensor = torch.linalg.qr(start).Q
    vectors, captured = q[:, :rank], 0.0
    for _ in range(_MOST_ITERATIONS):
        image = matrix @ q  # (rows, width)
        energy, rotation = torch.linalg.eigh((image.T @ image).to(torch.float64))  # rising
        before, captured = captured, float(energy[-rank:].sum())
        vectors = q @ rotation.flip(1)[:, :rank].to(q)
        if captured - before <= _CONVERGED * captured:
            break
        q = torch.linalg.qr(matrix.T @ image).Q
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _begin(state: dict[str, Any], parameter: nn.Parameter) -> None:
    state.update(step=0, decay=1.0, bases=[], updates=[])
    if parameter.dtype != torch.float32:
        state["start"] = parameter.detach().clone()


def _to(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - tensors, lists of tensors and numbers
    if isinstance(value, Tensor):
        return value.clone().to(device)
    return [_to(item, device) for item in value] if isinstance(value, list) else value
