"""An optimizer's moments as named tensors, to be kept at the site from one round to the next."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.protocol.tensors import Tensors, flatten, unflatten


def capture(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """Everything in the optimizer's state, grouped by what it is (``exp_avg`` ...), on the CPU."""
    groups: dict[str, Tensors] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                groups.setdefault(key, {})[name] = torch.as_tensor(value).detach().cpu().clone()
    return flatten(groups)


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put captured state back; a parameter without any, or of another shape by now, starts anew."""
    groups = unflatten(tensors)
    for name, parameter in parameters.items():
        found = {key: named[name] for key, named in groups.items() if name in named}
        if found and all(t.ndim == 0 or t.shape == parameter.shape for t in found.values()):
            optimizer.state[parameter] = {
                key: tensor.clone() if tensor.ndim == 0 else tensor.to(parameter.device, copy=True)
                for key, tensor in found.items()
            }
