"""Adam's second moments as part of the federation's state: `optimizer_state: averaged` of FedFTG.

After arXiv 2602.01746, which finds that sites whose second moments go apart drift apart. There a spectral method brings
together what sites hold in bases of their own. Here all sites share a random basis P in a round, and a new one in the
next, so what carries over is each direction's second moment averaged over the basis: with P drawn uniformly,
E (P' g)_k^2 = |g|^2 / n for every k, whatever the basis (g: a row of a gradient (m, n), projected on its shorter side;
a column where the other side is the shorter one). So the mean over k of last round's moments estimates this round's
without bias, takes one number for every row, and sites can be averaged by plain means.

What travels is corrected for Adam's bias. A site takes up as many steps later as its rounds so far had, so that
later gradients count for what they would in one long training.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.linalg.subspace import projects_right
from common.model.families import in_head

_SUFFIX = ".second_moment"


def is_second_moment(name: str) -> bool:
    """Whether a tensor of the state is a second moment."""
    return name.endswith(_SUFFIX)


def name_of(weight: str) -> str:
    """The name under which a weight's second moment travels."""
    return weight + _SUFFIX


def without(names: Iterable[str]) -> list[str]:
    """The names of what is no second moment."""
    return [name for name in names if not is_second_moment(name)]


def first(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Before round 1: zeros (longer side,) in float32 for every projected weight, which mean that nothing is known."""
    return {name_of(name): torch.zeros(max(w.shape)) for name, w in weights.items() if not in_head(name)}


def spread(moment: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """A moment (longer side,) in the shape that a weight of this ``shape`` is projected to, (m, r) or (r, n)."""
    return moment[:, None].repeat(1, rank) if projects_right(shape) else moment.repeat(rank, 1)


def gathered(moments: Tensor, shape: torch.Size) -> Tensor:
    """The other way round: the mean over the basis, (longer side,)."""
    return moments.mean(1 if projects_right(shape) else 0)
