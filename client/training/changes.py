"""The change of a weight within a round in its exact factors: c W_0 + sum_j P_j R_j, in the weight's optimizer state.

decay     c, the product of all (1 - lr weight_decay)
bases     P_j (r, n) or (m, r), one for every basis used, the current one last
updates   R_j (m, r) or (r, n) in float32; for an unprojected tensor a single one, in the tensor's shape
start     W_0, kept only for a bfloat16 or float16 weight: the weight is recomputed from W_0 and the factors in every
          step, because a step below the weight's resolution would be lost
"""

from typing import Any

import torch
from torch import Size, Tensor

from common.linalg.subspace import projects_right
from common.protocol.factors import Factors

State = dict[str, Any]


def begun(weight: Tensor, *, projected: bool) -> State:
    """The state at the start of a round: the weight is W_0."""
    state: State = {"decay": 1.0, "bases": [], "updates": []}
    if weight.dtype != torch.float32:
        state["start"] = weight.detach().clone()
    if not projected:
        state["updates"].append(torch.zeros_like(weight, dtype=torch.float32))
    return state


def open_term(state: State, basis: Tensor, shape: Size) -> None:
    """Switch to another basis, (r, n) or (m, r), of a weight (m, n)."""
    rows, columns = shape
    low = (rows, len(basis)) if projects_right(shape) else (basis.shape[1], columns)
    update = torch.zeros(low, dtype=torch.float32, device=basis.device)
    if state["bases"] and not state["updates"][-1].any():  # a kept basis that is refreshed in the round's first step
        state.update(bases=state["bases"][:-1], updates=state["updates"][:-1])
    state["bases"].append(basis)  # last, because the lines before may run out of memory: a term must not be half-opened
    state["updates"].append(update)


def add(state: State, weight: Tensor, change: Tensor, kept: float, *, projected: bool) -> None:
    """Add a step to a weight (m, n), and to its factors.

    Args:
        state: the weight's state.
        weight: the weight; changed in place.
        change: the step in the current basis, (m, r) or (r, n); for an unprojected tensor in the tensor's shape.
        kept: 1 - lr weight_decay, the factor by which the weight shrinks after the step.
        projected: whether the change is in a basis.
    """
    state["updates"][-1].add_(change)
    if kept != 1.0:
        state["decay"] *= kept
        for update in state["updates"]:
            update.mul_(kept)
    if "start" in state:
        shape, start = weight.shape, state["start"]
        weight.copy_(factors(state, shape, common=False).apply(start) if projected else whole(state, start))
        return
    if not projected:
        weight.add_(change)
    elif projects_right(weight.shape):
        weight.addmm_(change, state["bases"][-1])
    else:
        weight.addmm_(state["bases"][-1], change)
    if kept != 1.0:
        weight.mul_(kept)


def factors(state: State, shape: Size, *, common: bool) -> Factors:
    """The change of a projected weight (m, n); ``common``: in the basis that all sites share."""
    pairs = zip(state.get("updates", []), state.get("bases", []), strict=True)
    right = projects_right(shape)
    terms = [(update, basis) if right else (basis, update) for update, basis in pairs]
    return Factors(state.get("decay", 1.0), terms, common)


def whole(state: State, start: Tensor) -> Tensor:
    """An unprojected tensor after the round, in float32, if it was ``start`` (same shape) before the round."""
    weight: Tensor = start.to(torch.float32) * state["decay"]
    return weight.add_(state["updates"][0].to(start.device))
