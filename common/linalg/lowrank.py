"""Truncated SVD of ``dW = sum_k w_k B_k A_k`` from the factors alone.

With R = sum_k r_k columns in the stacked factors B (out, R) and A (R, in), dW = B A. A full dense SVD is never
computed. There are two ways to the leading right singular vectors, each held against a dense float64 SVD by the tests:

- the *core*: with L L^T = A A^T, the eigenvectors of the R x R matrix L^T (B^T B) L, in float64. It holds the whole
  spectrum. When R is not below the layer's shorter side, the short-side Gram matrix of dW takes its place;
- *iteration*, where that core is large and few components are wanted: a block Krylov space (Musco & Musco,
  arXiv 1504.05477), grown until the residual of every wanted component passes a test, which is repeated on the factors
  themselves. When it fails, the core decides.

Either way dW is then projected on the subspace found, so that U and V have orthonormal columns and U S V^T is the part
of dW that lives there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import AggregationError, DivergedAverage

ZERO = 1e-7  # singular values below this share of the largest w_k |B_k| |A_k| are rounding
RANK = 1e-6  # those above this share of the largest one count for the numerical rank
LARGE = 512  # cores smaller than this are solved at once
WIDE = 16  # so are cores of less than this many times the wanted rank
STEPS = 28  # most blocks of the Krylov space
CHECKS = (2, 3, 6, 10, 15, 20, 27)  # when convergence is looked at
RESIDUAL = 3e-7  # it is reached when |dW^T dW v - s^2 v| is below this share of s_1^2
DROPPED = 1e-6  # directions of a block below this share of its largest square are rounding
TINY = 1e-38  # keeps a zero from being divided by
TILE = 256  # columns of a Gram matrix that are computed together
ACCEPTED = 5e-6  # the result of iteration is taken when |dW^T u - s v| is below this share of s_1


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
        u: (out, rank); columns are orthonormal, or zero where ``s`` is.
        s: (rank,); descending, zero beyond dW's rank.
        vt: (rank, in); rows are orthonormal where ``s`` is not zero, else zero; the entry of largest magnitude of
            each is positive.
        energy: ``|dW|_F^2``, of the whole dW.
        numerical_rank: how many singular values of dW exceed 1e-6 of the largest; None when only the leading ones
            were computed.
        inner: (K, K); the Frobenius inner products of the terms' B_k A_k without their weights, float64.
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
        """Energy that the best approximation of this rank leaves out: the sum of the further sigma_i^2."""
        return max(0.0, self.energy - float(self.s[:rank].double().square().sum()))


def truncated_svd(terms: Sequence[Term], rank: int, name: str = "dW") -> TruncatedSVD:
    """The ``rank`` leading singular triplets of ``dW = sum_k w_k B_k A_k``.

    The best approximations of all smaller ranks are its slices.

    Args:
        terms: at least one; shapes (out, r_k) and (r_k, in) with common out and in.
        rank: how many triplets, from 1 to min(out, in).
        name: the layer's name, for messages.

    Returns:
        In float32, or in float64 when a factor is, whatever the type of the factors.

    Raises:
        AggregationError: the factors do not fit together, are not finite, the rank is out of range, or the
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
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise AggregationError(f"{name}: the singular values do not converge: {error}") from None
    u, s, vt = b.new_zeros(b.shape[0], rank), b.new_zeros(rank), a.new_zeros(rank, a.shape[1])
    kept = int((values > ZERO).sum()) if largest > 0 else 0
    signs = right[:kept].gather(1, right[:kept].abs().argmax(1, keepdim=True)).sign()
    u[:, :kept], s[:kept], vt[:kept] = left[:, :kept] * signs.T, values[:kept] * largest, right[:kept] * signs
    inner = _between(products, terms) * torch.outer(sizes, sizes)
    return TruncatedSVD(u, s, vt, energy * largest**2, numerical_rank if kept else 0, inner)


def inner_products(terms: Sequence[Term], name: str = "dW") -> Tensor:
    """Frobenius inner products of the terms' B_k A_k without their weights: (K, K), float64.

    Raises:
        AggregationError: the factors do not fit together.
    """
    b, a, sizes = _stack(terms, name)
    return _between(_gram(b.double()) * _gram(a.T.double()), terms) * torch.outer(sizes, sizes)


def _stack(terms: Sequence[Term], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The factors side by side, each divided by its norm; and |B_k| |A_k| of every term, float64."""
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
    """A value per term as one per column of B, or row of A."""
    return values.repeat_interleave(torch.tensor([len(term.a) for term in terms]))


def _between(products: Tensor, terms: Sequence[Term]) -> Tensor:
    """Sums of the (R, R) matrix over the rows and columns of each pair of terms: (K, K), float64."""
    ranks = [len(term.a) for term in terms]
    sums = torch.stack([rows.sum(0, dtype=torch.float64) for rows in products.split(ranks)])
    return torch.stack([columns.sum(1) for columns in sums.split(ranks, dim=1)], dim=1)


def _leading(
    b: Tensor, a: Tensor, weights: Tensor, rank: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float, int | None]:
    """Entrywise product of the two Gram matrices; leading triplets, at most ``rank``; energy; numerical rank of dW."""
    terms, weighted = b.shape[1], a * weights[:, None]
    iterates = terms >= max(LARGE, WIDE * rank) and b.dtype == torch.float32
    precision = torch.float32 if iterates else torch.float64
    gram_b, gram_a = _gram(b.to(precision)), _gram(a.T.to(precision))
    inner = gram_b * gram_a
    energy = float(weights.double() @ inner.double() @ weights.double())
    if iterates:
        triplets = _refine(b, weighted, _iterate(gram_b, gram_a * weights * weights[:, None], rank))
        if triplets is not None:
            return inner, triplets, energy, None
    if terms < min(b.shape[0], a.shape[1]):
        double = weights.double()
        basis, squares = _from_factors(gram_b.double(), gram_a.double() * double * double[:, None], weighted, rank)
    else:
        basis, squares = _from_product(b @ weighted, rank)
    floor = max(RANK**2 * float(squares[0]), ZERO**2)
    return inner, _project(b, weighted, basis.to(b.dtype)), energy, int((squares > floor).sum())


def _project(b: Tensor, a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of the part of b @ a whose rows lie in the span of ``basis`` (in, rank)."""
    basis, _ = torch.linalg.qr(basis)
    u, s, vt = torch.linalg.svd(b @ (a @ basis), full_matrices=False)
    return u, s, vt @ basis.T


def _from_factors(gram_b: Tensor, gram_a: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors and all squared singular values, from the R x R core."""
    squares, rotation = torch.linalg.eigh(gram_a)
    root = rotation * squares.clamp_min(0.0).sqrt()
    values, vectors = torch.linalg.eigh(root.T @ gram_b @ root)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    columns = gram_b @ (root @ vectors[:, : max(1, int((values[:rank] > ZERO**2 * values[0]).sum()))])
    return a.T.double() @ (columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(TINY)), values


def _from_product(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same from dW itself, when it is no larger than the core would be."""
    tall = product.shape[0] >= product.shape[1]
    double = product.double()
    values, vectors = torch.linalg.eigh(_gram(double if tall else double.T))
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)[:, :rank]
    return vectors if tall else double.T @ vectors, values


def _iterate(gram_b: Tensor, gram_a: Tensor, rank: int) -> Tensor | None:
    """Coordinates c (R, rank) of the leading right singular vectors v = A^T c; None when they do not converge.

    Block Lanczos in the coordinates, where dW^T dW is c -> B^T B A A^T c and v has the length sqrt(c^T A A^T c): a step
    costs two products with R x R matrices, whatever the layer's size. Directions of no length are dropped.
    """
    block = rank + 8
    new = torch.randn(block, len(gram_a), generator=torch.Generator().manual_seed(0))
    basis, image, projected = (new.new_empty(STEPS * block, len(gram_a)) for _ in range(3))  # c; AA^T c; B^TB AA^T c
    size, width = 0, 0  # of the basis, of its newest block
    for step in range(min(STEPS, len(gram_a) // block)):
        for _ in range(2):  # twice is enough for orthogonality to rounding
            new = new - (new @ image[:size].T) @ basis[:size]
        new_image = new @ gram_a
        lengths = new @ new_image.T
        if step in CHECKS and size >= rank:
            values, vectors = torch.linalg.eigh(image[:size] @ projected[:size].T)
            last = vectors[size - width :, -rank:]
            if float((last * (lengths @ last)).sum(0).max()) <= (RESIDUAL * float(values[-1])) ** 2:
                found: Tensor = vectors[:, -rank:].T @ basis[:size]
                return found.T
        squares, rotation = torch.linalg.eigh(lengths.double())
        kept = squares > max(DROPPED * float(squares[-1]), 0.0)
        width = int(kept.sum())
        if width == 0:
            return None
        turn = (rotation[:, kept] / squares[kept].sqrt()).T.to(new.dtype)
        grown = slice(size, size + width)
        basis[grown], image[grown] = turn @ new, turn @ new_image
        projected[grown] = new = image[grown] @ gram_b
        size += width
    return None


def _refine(b: Tensor, a: Tensor, coordinates: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Triplets that pass the residual test on the factors themselves, after at most three steps of power iteration."""
    if coordinates is None:
        return None
    basis = a.T @ coordinates
    for _ in range(3):
        u, s, vt = _project(b, a, basis)
        basis = a.T @ (b.T @ u)
        if float(torch.linalg.vector_norm(basis - vt.T * s, dim=0).max()) <= ACCEPTED * float(s[0]):
            return u, s, vt
    return None


def _gram(matrix: Tensor) -> Tensor:
    """``matrix.T @ matrix``, of which only the blocks above the diagonal are computed."""
    columns = matrix.shape[1]
    gram = matrix.new_empty(columns, columns)
    for start in range(0, columns, TILE):
        rows = slice(start, start + TILE)
        gram[rows, start:] = matrix[:, rows].T @ matrix[:, start:]
        gram[start + TILE :, rows] = gram[rows, start + TILE :].T
    return gram
