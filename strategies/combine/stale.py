"""Updates that started from an earlier version of the state, for the version that is being made.

Source: FedBuff (arXiv 2106.06639). An update's change, not its tensors, is added to the current state, and the change
is multiplied by s(age) = 1 / sqrt(1 + age), where the age is the number of versions made while the site trained:

    W <- W + sum_k p_k s(age_k) D_k,    p_k = n_k / sum n

The p_k do not contain s, as in the paper: where all updates are old, the step is smaller. A change in factors is the
map W -> c W + L R; its decay c shrinks the current weights, not those that the site had.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from common.protocol.factors import Factors
from common.protocol.tensors import Tensors


def staleness(age: int) -> float:
    """The part of a change that counts: 1 / sqrt(1 + age), which is 1 for an update of the current version."""
    return 1.0 / math.sqrt(1.0 + age)


def added(
    tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float
) -> Tensors:
    """State + share (tensors - start), in float32, for dense tensors of an update; all shapes are the same."""
    return {
        name: (tensor.to(torch.float32) - start[name].to(torch.float32)).mul_(share).add_(state[name])
        for name, tensor in tensors.items()
    }


def shrunk(changes: Mapping[str, Factors], state: Mapping[str, Tensor], share: float) -> dict[str, Factors]:
    """Changes in factors, multiplied by ``share``."""
    return {name: change.scaled(state[name].shape, share) for name, change in changes.items()}
