"""Adam's second moments as part of the federation's state: `optimizer_state: averaged` of FedFTG.

After arXiv 2602.01746, which finds that sites drift apart when their second moments do. That paper aligns the sites'
own bases by a spectral method. FedSpan instead draws one random basis P per round for all sites (decision 022). The
basis changes between rounds, so a moment is kept as the mean over the basis's directions: with P drawn uniformly,
E (P' g)_k^2 = |g|^2 / n for every direction k and any basis (g: a row of a gradient (m, n) with m >= n; a column
otherwise). So the mean over k of last round's moments is an unbiased estimate for this round, takes one number per row,
and the server can average the sites' moments by a plain mean.

Moments are sent after bias correction. A site starts Adam's step counter at the number of steps of all earlier rounds,
so bias correction and decay are those of one continuous run.
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
    """The names that are not second moments."""
    return [name for name in names if not is_second_moment(name)]


def among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second moments among a state's tensors."""
    return {name: tensor for name, tensor in tensors.items() if is_second_moment(name)}


def first(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments before round 1: float32 zeros (longer side,) for every projected weight."""
    return {name_of(name): torch.zeros(max(w.shape)) for name, w in weights.items() if not in_head(name)}


def spread(moment: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """Repeat a moment (longer side,) over the basis's directions: (m, r) or (r, n), as a projected gradient."""
    return moment[:, None].repeat(1, rank) if projects_right(shape) else moment.repeat(rank, 1)


def gathered(moments: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``spread``: the mean of moments (m, r) or (r, n) over the basis's directions, (longer side,)."""
    return moments.mean(1 if projects_right(shape) else 0)
