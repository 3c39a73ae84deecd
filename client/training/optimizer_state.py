"""An optimizer's moments as named tensors, to be kept at the site from one round to the next."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def capture(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Everything in the optimizer's state, as ``<key>|<parameter name>``, on the CPU."""
    return {
        f"{key}|{name}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put captured state back; a parameter without any, or of another shape by now, starts anew."""
    for name, parameter in parameters.items():
        found = {key.partition("|")[0]: t for key, t in tensors.items() if key.partition("|")[2] == name}
        if found and all(t.ndim == 0 or t.shape == parameter.shape for t in found.values()):
            optimizer.state[parameter] = {
                key: tensor.clone() if tensor.ndim == 0 else tensor.to(parameter.device, copy=True)
                for key, tensor in found.items()
            }
