"""The leading singular vectors of a gradient, without its SVD."""

import torch
from torch import Tensor

_OVERSAMPLING = 8
_MOST_ITERATIONS = 12
_CONVERGED = 1e-3  # an iteration that adds less than this share of the captured energy is the last


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
