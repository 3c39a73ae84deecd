"""Truncated SVD of ``dW = sum_k w_k B_k A_k`` from the factors alone.

With R = sum_k r_k columns in the stacked factors B (out, R) and A (R, in), dW = B A. A full dense SVD is never
computed (decision 004). There are two ways to the leading right singular vectors; the tests compare both with a dense
float64 SVD:

- the *core*: with M M^T = A A^T, the eigenvectors of M^T (B^T B) M, at most R x R. When R is not below the layer's
  shorter side, the short-side Gram matrix of dW takes the core's place;
- *power iteration*, where R is large; convergence is tested on the factors themselves (decision 023). When clients
  trained from common factors, dW has a gap in the spectrum after the wanted components, so few steps suffice. Without
  such a gap the core is used.

Either way dW is then projected on the subspace found, so that U and V have orthonormal columns and U S V^T is the
projection of dW.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import linalg
from scipy.linalg import lapack
from torch import Tensor

from common.errors import AggregationError, DivergedAverage
from common.linalg.gram import gram

ZERO = 1e-7  # singular values below this share of the largest w_k |B_k| |A_k| are rounding
RANK = 1e-6  # singular values above this share of the largest one count for the numerical rank
LARGE = 512  # from this many columns on, only the wanted part of the spectrum is computed
SPARE = 8  # extra directions that power iteration carries, so that the wanted ones converge faster
STEPS = 4  # steps of power iteration before the first test of convergence
TINY = 1e-38  # smallest divisor: a factor of zeros is not divided by zero


@dataclass(frozen=True)
class Term:
    """One summand ``weight * b @ a``."""

    weight: float
    b: Tensor  # (out, r)
    a: Tensor  # (r, in)


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading part of dW = U diag(S) V^T.

    Attributes:
        u: (out, rank); columns are orthonormal where ``s`` is not zero, else zero.
        s: (rank,); descending, zero beyond dW's rank.
        vt: (rank, in); rows are orthonormal where ``s`` is not zero, else zero; each row's entry of largest magnitude
            is positive.
        energy: ``|dW|_F^2`` of the complete dW.
        numerical_rank: number of singular values of dW above 1e-6 of the largest; None from 512 stacked columns on,
            where only the leading singular values are computed.
        inner: (K, K); Frobenius inner products of the terms' B_k A_k without the terms' weights, float64.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    energy: float
    numerical_rank: int | None
    inner: Tensor

    @property
    def stable_rank(self) -> float:
        """``|dW|_F^2 / |dW|_2^2``; 0 for dW = 0."""
        return self.energy / float(self.s[0]) ** 2 if self.s[0] > 0 else 0.0

    def lost(self, rank: int) -> float:
        """Energy that the best approximation of this rank leaves out: the sum of sigma_i^2 for i > rank."""
        return max(0.0, self.energy - float(self.s[:rank].double().square().sum()))


def truncated_svd(terms: Sequence[Term], rank: int, name: str = "dW") -> TruncatedSVD:
    """The ``rank`` leading singular triplets of ``dW = sum_k w_k B_k A_k``.

    Slices of the result are the best approximations of smaller rank.

    Args:
        terms: at least one; shapes (out, r_k) and (r_k, in) with common out and in.
        rank: number of triplets, from 1 to min(out, in).
        name: the layer's name, for messages.

    Returns:
        Triplets in float64 when a factor is float64, else in float32.

    Raises:
        AggregationError: the factors' shapes do not match, a factor is not finite, the rank is out of range, or the
            eigenvalues do not converge.
    """
    b, a, sizes = _stack(terms, name)
    if not 1 <= rank <= min(b.shape[0], a.shape[1]):
        raise AggregationError(f"{name}: rank {rank} is out of range; allowed: 1 to {min(b.shape[0], a.shape[1])}")
    weights = sizes * torch.tensor([term.weight for term in terms], dtype=torch.float64)
    largest = float(weights.abs().max())
    columns = _columns(weights / (largest or 1.0), terms)
    try:
        products, (left, values, right), energy, numerical_rank = _leading(b, a, columns.to(b.dtype), rank)
    except (linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise AggregationError(f"{name}: the singular values do not converge: {error}") from None
    u, s, vt = b.new_zeros(b.shape[0], rank), b.new_zeros(rank), a.new_zeros(rank, a.shape[1])
    kept = int((values > ZERO).sum()) if largest > 0 else 0
    signs = right[:kept].gather(1, right[:kept].abs().argmax(1, keepdim=True)).sign()
    u[:, :kept], s[:kept], vt[:kept] = left[:, :kept] * signs.T, values[:kept] * largest, right[:kept] * signs
    inner = _between(products, terms) * torch.outer(sizes, sizes)
    return TruncatedSVD(u, s, vt, energy * largest**2, numerical_rank if kept else 0, inner)


def inner_products(terms: Sequence[Term], name: str = "dW") -> Tensor:
    """Frobenius inner products of the terms' B_k A_k without the terms' weights: (K, K), float64.

    Raises:
        AggregationError: the factors' shapes do not match.
    """
    b, a, sizes = _stack(terms, name)
    return _between(gram(b.double()) * gram(a.T.double()), terms) * torch.outer(sizes, sizes)


def _stack(terms: Sequence[Term], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked B (out, R) and A (R, in), each factor divided by its norm; and every term's |B_k| |A_k|, float64."""
    if not terms:
        raise AggregationError(f"{name}: no factors to add up")
    out, in_ = terms[0].b.shape[0], terms[0].a.shape[-1]
    for term in terms:
        if term.b.shape != (out, term.a.shape[0]) or term.a.shape[1:] != (in_,):
            raise AggregationError(
                f"{name}: factors of shape {tuple(term.b.shape)} and {tuple(term.a.shape)} do not fit ({out}, r) and "
                f"(r, {in_})"
            )
    double = any(torch.float64 in (term.b.dtype, term.a.dtype) for term in terms)
    dtype = torch.float64 if double else torch.float32
    b = torch.cat([term.b.to(dtype) for term in terms], dim=1)
    a = torch.cat([term.a.to(dtype) for term in terms], dim=0)
    norms_b = torch.tensor([float(torch.linalg.vector_norm(term.b)) for term in terms], dtype=torch.float64)
    norms_a = torch.tensor([float(torch.linalg.vector_norm(term.a)) for term in terms], dtype=torch.float64)
    sizes = norms_b * norms_a
    if not torch.isfinite(sizes).all():
        raise DivergedAverage(f"{name}: a factor holds values that are not finite, or too large to be squared")
    b.div_(_columns(norms_b.clamp_min(TINY).to(dtype), terms))
    a.div_(_columns(norms_a.clamp_min(TINY).to(dtype), terms)[:, None])
    return b, a, sizes


def _columns(values: Tensor, terms: Sequence[Term]) -> Tensor:
    """Expand one value per term (K,) to one value per column of B, or row of A (R,)."""
    return values.repeat_interleave(torch.tensor([len(term.a) for term in terms]))


def _between(products: Tensor, terms: Sequence[Term]) -> Tensor:
    """Sum an (R, R) matrix over the rows and columns of each pair of terms: (K, K), float64."""
    ranks = [len(term.a) for term in terms]
    sums = torch.stack([rows.sum(0, dtype=torch.float64) for rows in products.split(ranks)])
    return torch.stack([columns.sum(1) for columns in sums.split(ranks, dim=1)], dim=1)


def _leading(
    b: Tensor, a: Tensor, weights: Tensor, rank: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float, int | None]:
    """Leading triplets of dW, at most ``rank``, from B (out, R), A (R, in) and one weight per column (R,).

    Returns:
        The entrywise product of the two Gram matrices (R, R), the triplets, the energy, the numerical rank.
    """
    terms, weighted = b.shape[1], a * weights[:, None]
    large, short = terms >= LARGE, min(b.shape[0], a.shape[1])
    precision = b.dtype if large else torch.float64
    gram_b, gram_a = gram(b.to(precision)), gram(a.T.to(precision))
    inner = gram_b * gram_a
    energy = float(weights.double() @ inner.double() @ weights.double())
    gram_a *= torch.outer(weights, weights)
    if large and (triplets := _iterate(b, weighted, gram_b, gram_a, rank)):
        return inner, triplets, energy, None
    count = rank if large else min(terms, short)
    if terms < short:
        basis, squares = _from_factors(gram_b, gram_a, weighted, rank, count)
    else:
        basis, squares = _from_product(b @ weighted, rank, count)
    floor = max(RANK**2 * float(squares[0]), ZERO**2)
    return inner, _project(b, weighted, basis.to(b.dtype)), energy, None if large else int((squares > floor).sum())


def _iterate(b: Tensor, a: Tensor, gram_b: Tensor, gram_a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets by power iteration; None when a step gains less than a decimal digit (decision 023).

    The first steps use the coordinates c of v = A^T c, where dW^T dW becomes c -> B^T B A A^T c, so the cost of these
    steps does not depend on the layer's size.
    """
    block = min(rank + SPARE, len(gram_a))
    coordinates = torch.randn(len(gram_a), block, generator=torch.Generator().manual_seed(0)).to(b.dtype)
    for _ in range(STEPS):
        coordinates, _ = torch.linalg.qr(gram_b @ (gram_a @ coordinates))
    # A sum of n terms has an error of about sqrt(n) roundings (Higham & Mary, doi.org/10.1137/18M1226312); dW^T (dW v)
    # sums over all sides of B and A, one after another.
    tolerance = torch.finfo(b.dtype).eps * (sum(a.shape) + sum(b.shape)) ** 0.5
    basis, before = a.T @ coordinates, torch.inf
    while True:
        u, s, vt = _project(b, a, basis)
        basis = a.T @ (b.T @ u)
        residual = float(torch.linalg.vector_norm(basis - vt.T * s, dim=0)[:rank].max())
        if residual <= tolerance * float(s[0]):
            return u[:, :rank], s[:rank], vt[:rank]
        if not residual <= before / 10:  # not "residual > ...": a residual that is NaN must end the loop, too
            return None
        before = residual


def _project(b: Tensor, a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of the part of b @ a whose rows lie in the span of ``basis`` (in, rank)."""
    basis, _ = torch.linalg.qr(basis)
    u, s, vt = torch.linalg.svd(b @ (a @ basis), full_matrices=False)
    return u, s, vt @ basis.T


def _from_factors(gram_b: Tensor, gram_a: Tensor, a: Tensor, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Basis (in, rank) of the leading right singular vectors, and ``count`` squared singular values, from the core."""
    lower, pivots, size, _ = lapack.dpstrf(gram_a.double().numpy(), lower=True)
    root = torch.zeros_like(gram_a)
    root[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(lower).tril().to(root.dtype)
    root = root[:, : max(1, size)]
    values, vectors = _largest(root.T @ gram_b @ root, count)
    kept = max(1, int((values[:rank] > ZERO**2 * values[0]).sum()))
    columns = gram_b @ (root @ vectors[:, :kept].to(root.dtype))
    return a.T.to(root.dtype) @ (columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(TINY)), values


def _from_product(product: Tensor, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Basis (in, rank) and ``count`` squared singular values from dW itself, when dW is no larger than the core."""
    tall = product.shape[0] >= product.shape[1]
    double = product.double()
    values, vectors = _largest(gram(double if tall else double.T), count)
    return vectors[:, :rank] if tall else double.T @ vectors[:, :rank], values


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending and clamped at zero, and their eigenvectors as columns."""
    last = len(matrix) - 1
    values, vectors = linalg.eigh(matrix.double().numpy(), subset_by_index=(max(0, last + 1 - count), last))
    return torch.from_numpy(values).flip(0).clamp_min(0.0), torch.from_numpy(vectors).flip(1)
