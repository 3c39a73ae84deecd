"""Truncated SVD of ``dW = sum_k w_k B_k A_k`` from the factors alone.

A full dense SVD is never computed. With R = sum_k r_k columns in the stacked factors B (out, R) and A (R, in), and
dW = B A, there are two ways; both are held against a dense float64 SVD by the tests:

- the *core*: eigenvectors of the R x R matrix L^T (B^T B) L with L L^T = A A^T, in float64, which holds the whole
  spectrum; when R is not below the layer's shorter side, those of the layer's own short-side Gram matrix;
- *iteration*, where that core is large and few components are wanted: a block Krylov space grown until the residual
  of every wanted component passes a test (Musco & Musco, arXiv 1504.05477). When it does not, the core decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import AggregationError

ZERO = 1e-7  # singular values below this share of the factors' size are rounding: the core squares them in float64
RANK = 1e-6  # those above this share of the largest one count for the numerical rank
LARGE = 640  # cores smaller than this are solved at once
WIDE = 24  # so are cores of less than this many times the wanted rank
RESIDUAL = 2e-7  # iteration ends when |dW^T u - sigma v| is below this share of the largest singular value


@dataclass(frozen=True)
class Term:
    """One summand ``weight * b @ a``."""

    weight: float
    b: Tensor  # (out, r)
    a: Tensor  # (r, in)


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading part of dW = U diag(S) V^T, float64.

    Attributes:
        u: (out, rank); columns are orthonormal, or zero where ``s`` is.
        s: (rank,); descending, zero beyond dW's rank.
        vt: (rank, in); rows are orthonormal, also where ``s`` is zero; the largest entry of each is positive.
        energy: ``|dW|_F^2``, of the whole dW.
        numerical_rank: how many singular values of dW exceed 1e-6 of the largest; None when only the leading ones
            were computed.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    energy: float
    numerical_rank: int | None

    @property
    def stable_rank(self) -> float:
        """``|dW|_F^2 / |dW|_2^2``; 0 for dW = 0."""
        return self.energy / float(self.s[0]) ** 2 if self.s[0] > 0 else 0.0

    def lost(self, rank: int) -> float:
        """Energy that the best approximation of this rank leaves out: the sum of the further sigma_i^2."""
        return max(0.0, self.energy - float(self.s[:rank].square().sum()))


def truncated_svd(terms: Sequence[Term], rank: int, name: str = "dW") -> TruncatedSVD:
    """The ``rank`` leading singular triplets of ``dW = sum_k w_k B_k A_k``.

    The best approximations of all smaller ranks are its slices. Computed in float32, or in float64 when a factor is,
    whatever the type of the factors.

    Args:
        terms: at least one; shapes (out, r_k) and (r_k, in) with common out and in.
        rank: how many triplets, from 1 to min(out, in).
        name: the layer's name, for messages.

    Raises:
        AggregationError: the factors do not fit together, are not finite, the rank is out of range, or the
            eigenvalues do not converge.
    """
    b, a = _stack(terms, name)
    if not 1 <= rank <= min(b.shape[0], a.shape[1]):
        raise AggregationError(f"{name}: rank {rank} is out of range; allowed: 1 to {min(b.shape[0], a.shape[1])}")
    size_b, size_a = float(b.abs().max()), float(a.abs().max())
    if not (np.isfinite(size_b) and np.isfinite(size_a)):
        raise AggregationError(f"{name}: a factor holds values that are not finite")
    if size_b == 0 or size_a == 0:
        u, s, v, energy, numerical_rank = b.new_zeros(b.shape[0], 0), b.new_zeros(0), a.new_zeros(a.shape[1], 0), 0.0, 0
    else:
        u, s, v, energy, numerical_rank = _solve(b / size_b, a / size_a, rank, name)
    return ()
