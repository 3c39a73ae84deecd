"""An optimizer's state between two rounds, as named tensors that stay at the site."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from client.training import changes
from client.training.galore import GaLore
from common.protocol.tensors import Tensors, flatten, unflatten

_BASIS = "basis"
_OF_A_ROUND = {"decay", "bases", "updates", "start", "low"}  # keys of GaLore's state that end with the round


def capture(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """Copy the optimizer's state to the CPU, grouped by key (``exp_avg`` ...); of GaLore's bases the current one."""
    groups: dict[str, Tensors] = {}
    for name, parameter in parameters.items():
        state = dict(optimizer.state[parameter])
        if isinstance(optimizer, GaLore):
            bases = state.get("bases")
            state = {key: value for key, value in state.items() if key not in _OF_A_ROUND}
            state |= {_BASIS: bases[-1]} if bases else {}
        for key, value in state.items():
            if value is not None:
                groups.setdefault(key, {})[name] = torch.as_tensor(value).detach().cpu().clone()
    return flatten(groups)


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore captured state; a parameter without captured state, or of another shape by now, starts with none."""
    groups = unflatten(tensors)
    for name, parameter in parameters.items():
        found = {key: named[name] for key, named in groups.items() if name in named}
        if not found:
            continue
        if isinstance(optimizer, GaLore):
            optimizer.state[parameter] = _projected(parameter, found)
        elif all(t.ndim == 0 or t.shape == parameter.shape for t in found.values()):
            optimizer.state[parameter] = {key: tensor.to(parameter.device, copy=True) for key, tensor in found.items()}


def _projected(parameter: nn.Parameter, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """GaLore's state of a tensor at the start of a round that goes on with ``found``."""
    state: dict[str, Any] = changes.begun(parameter, projected=_BASIS in found)
    for key, tensor in found.items():
        if key == _BASIS:
            changes.open_term(state, tensor.to(parameter.device, copy=True), parameter.shape)
        else:
            state[key] = int(tensor) if tensor.ndim == 0 else tensor.to(parameter.device, copy=True)
    return state
