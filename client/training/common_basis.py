"""The leading basis of a gradient that several devices of a site compute together (decision 037)."""

import torch
from torch import Tensor

from client.training.ranks import Ranks
from common.linalg.range_finder import leading_basis
from common.linalg.subspace import projects_right


def common_basis(
    ranks: Ranks, gradient: Tensor, rank: int, last: Tensor | None, generator: torch.Generator
) -> Tensor | None:
    """The leading basis of a gradient's sum over all ranks, the same at each; None: the sum is not finite.

    Rank 0 computes it: devices may differ in the last bits. Afterwards ``gradient`` is the sum at rank 0 and zero
    elsewhere, so that the sum of the ranks' projected gradients is right.
    """
    ranks.sum_at_first(gradient)
    if not torch.isfinite(gradient).all():
        return None
    if ranks.rank == 0:
        basis = leading_basis(gradient, rank, last, generator)
    else:
        rows, columns = gradient.shape
        basis = gradient.new_empty((rank, columns) if projects_right(gradient.shape) else (rows, rank))
    ranks.from_first([basis])
    return basis
