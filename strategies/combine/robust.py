"""Aggregation of a round's updates: the mean, and robust methods that limit the influence of a few wrong updates.

- Norm clipping: no client's change has a norm above ``clip_norm`` times the cohort's median norm.
- Trimmed mean and median, coordinate by coordinate (Yin et al. 2018, arXiv 1803.01498, Definitions 1 and 2).
- Krum and multi-Krum (Blanchard et al. 2017, arXiv 1703.02757, section 4): the updates nearest to their neighbors.

The plain mean adds each update as it arrives, then frees it (decision 008). The other methods need all K updates of
the round at once, in factors where they came in factors (decision 012). Trimmed mean and median cost O(K log K) per
coordinate and BLOCK bytes; the result is dense, so the server sends it dense. Clipping, Krum and multi-Krum keep
factors: the inner products cost O((m + n) R^2) for a weight (m, n) with R columns in all clients' factors, plus
float64 copies of the factors, plus O(m n R) where there is decay; O(m n K^2) for dense updates.

All methods work on changes relative to the state, never on absolute weights, which are larger by orders of magnitude.
Updates are sorted by the clients' names, so that the order of arrival changes no bit of the result.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor

from common.config.aggregation import AggregationConfig, KrumConfig, MeanConfig, MultiKrumConfig, TrimmedMeanConfig
from common.errors import AggregationError
from common.protocol.factors import Factors
from common.protocol.tensors import Tensors
from strategies.combine.weighted_mean import NO_UPDATE, Changed, Means, WeightedMean

BLOCK = 64 * 2**20  # bytes: so many rows of a tensor, of all clients together, are in memory at once


class Contribution(NamedTuple):
    """One client's part in a round: name, number of training examples, and trained tensors or changes in factors."""

    client: str
    num_examples: int
    tensors: Changed


def combine(
    method: AggregationConfig, base: Mapping[str, Tensor], contributions: Iterable[Contribution]
) -> tuple[Means, dict[str, float]]:
    """Aggregate a round's updates.

    Args:
        method: the federation file's aggregation section.
        base: the state that the clients started from.
        contributions: one per client; all hold the same names, in shapes as in the base.

    Returns:
        The aggregated tensors, or factors of their changes where the method keeps factors; and diagnostics: ``clipped``
        (number of clients) with ``clip-factor/<client>``, ``trimmed`` (values left out at either end of every
        coordinate), ``krum-selected/<client>`` (1 or 0).

    Raises:
        AggregationError: there is no contribution, or fewer than Krum needs.
    """
    if isinstance(method, MeanConfig) and method.weights == "uniform":
        contributions = (one._replace(num_examples=1) for one in contributions)
    if isinstance(method, MeanConfig) and method.clip_norm is None:
        return _mean(base, contributions), {}
    kept = sorted(contributions, key=lambda one: one.client)
    if not kept:
        raise AggregationError(NO_UPDATE)
    if isinstance(method, KrumConfig | MultiKrumConfig):
        order = krum_order(gram([one.tensors for one in kept], base), method.byzantine)
        chosen = order[: 1 if isinstance(method, KrumConfig) else len(kept) - method.byzantine]
        told = {f"krum-selected/{one.client}": float(k in chosen) for k, one in enumerate(kept)}
        return _mean(base, [kept[k] for k in sorted(chosen)]), told
    told = {}
    if method.clip_norm is not None:
        factors = clip_factors([gram([one.tensors], base).item() for one in kept], method.clip_norm)
        told = {f"clip-factor/{one.client}": factor for one, factor in zip(kept, factors, strict=True)}
        told["clipped"] = float(sum(factor < 1 for factor in factors))
        kept = [one._replace(tensors=scaled(one.tensors, base, t)) for one, t in zip(kept, factors, strict=True)]
    if isinstance(method, MeanConfig):
        return _mean(base, kept), told
    most = (len(kept) - 1) // 2  # trimming so many at either end leaves one or two values: the mean is the median
    drop = trimmed(len(kept), method.trim) if isinstance(method, TrimmedMeanConfig) else most
    return dict(trimmed_mean([one.tensors for one in kept], base, drop)), {**told, "trimmed": float(drop)}


def _mean(base: Mapping[str, Tensor], contributions: Iterable[Contribution]) -> Means:
    """Mean weighted by examples; each contribution is added as it arrives."""
    mean = WeightedMean(base)
    for one in contributions:
        mean.fold(one.tensors, one.num_examples)
        del one  # decision 008: else it lives on while the next is read
    return mean.means()


def clip_factors(squares: Sequence[float], clip_norm: float) -> list[float]:
    """``min(1, clip_norm * median / norm)`` per client, from squared norms; for an even number the lower median."""
    norms = _squares(torch.tensor(squares, dtype=torch.float64)).sqrt().tolist()
    bound = clip_norm * median_low(norms)
    return [1.0 if norm <= bound else bound / norm for norm in norms]


def scaled(tensors: Changed, base: Mapping[str, Tensor], factor: float) -> Changed:
    """The update with its change multiplied by ``factor``: factors stay factors, dense tensors become float32."""
    if factor == 1.0:
        return tensors
    return {
        name: value.scaled(base[name].shape, factor)
        if isinstance(value, Factors)
        else torch.lerp(base[name].to(torch.float32), value.to(torch.float32), factor)
        for name, value in tensors.items()
    }


def trimmed(count: int, trim: float) -> int:
    """floor(trim * count) in decimal arithmetic: 0.29 * 100 is 29, while binary floats would give 28."""
    return math.floor(Fraction(str(trim)) * count)


def trimmed_mean(updates: Sequence[Changed], base: Mapping[str, Tensor], drop: int) -> Tensors:
    """The unweighted mean of every coordinate without its ``drop`` largest and smallest values.

    Computed in float32, for rows of one tensor at a time. Values that overflow to NaN count among the largest.

    Args:
        updates: at least 2 drop + 1, in shapes as in the base.
        base: the state.
        drop: number of values left out at either end.

    Returns:
        Dense tensors in the base's dtypes.
    """
    result = {}
    for name in updates[0]:
        start = _matrix(base[name])
        after = torch.empty(start.shape, dtype=start.dtype)
        for rows in _blocks(start, 4 * len(updates)):
            changes = torch.stack([_change(update[name], start, rows) for update in updates])  # (K, rows, n)
            changes.numpy().sort(axis=0)  # in place; several times as fast as torch.sort along dimension 0
            after[rows] = start[rows].to(torch.float32) + changes[drop : len(updates) - drop].mean(0)
        result[name] = after.reshape(base[name].shape)
    return result


def krum_order(inner: Tensor, byzantine: int) -> list[int]:
    """Indices of the updates from the best Krum score to the worst; ties keep the order of ``inner``.

    The score is the sum of the K - f - 2 smallest squared distances to other updates.

    Args:
        inner: (K, K), inner products of the clients' changes, float64.
        byzantine: f, number of clients that may send arbitrary updates.

    Raises:
        AggregationError: K < 2 f + 3.
    """
    count, needed = len(inner), 2 * byzantine + 3
    if count < needed:
        fewer = f", or byzantine up to {(count - 3) // 2}" if count >= 3 else ""
        raise AggregationError(
            f"Krum with K = {count} updates and byzantine f = {byzantine}; allowed: K from 2 f + 3 = {needed}{fewer}"
        )
    norms = inner.diagonal()
    distances = _squares(norms[:, None] + norms - 2 * inner).fill_diagonal_(math.inf)
    scores = distances.sort(dim=1).values[:, : count - byzantine - 2].sum(1).tolist()
    return sorted(range(count), key=lambda k: float(scores[k]))


def _squares(computed: Tensor) -> Tensor:
    """Squared norms or distances, repaired: negative values are rounding errors (0), NaN comes from overflow (inf)."""
    return computed.clamp_min(0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def gram(updates: Sequence[Changed], base: Mapping[str, Tensor]) -> Tensor:
    """Inner products of the clients' changes over all tensors: (K, K), float64, symmetric to the last bit."""
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0]:
        total += _gram([update[name] for update in updates], _matrix(base[name]))
    return (total + total.T) / 2


def _gram(values: Sequence[Tensor | Factors], start: Tensor) -> Tensor:
    """Inner products of the clients' changes of one tensor (m, n): (K, K), float64.

    Client k's change is X_k + (c_k - 1) W_0, where X_k is L_k R_k or dense. The function computes the inner products
    of the K + 1 parts X_1 ... X_K, W_0 first. Products L_k R_k are never formed; dense parts are read block by block.
    """
    count = len(values)
    shrunk = torch.tensor([v.decay - 1.0 if isinstance(v, Factors) else 0.0 for v in values], dtype=torch.float64)
    stacked = {k: value.stacked(tuple(start.shape)) for k, value in enumerate(values) if isinstance(value, Factors)}
    dense = [k for k in range(count) if k not in stacked] + ([count] if shrunk.any() else [])
    left = torch.cat([start.new_zeros(len(start), 0), *(left for left, _ in stacked.values())], 1).double()  # (m, R)
    right = torch.cat([start.new_zeros(0, start.shape[1]), *(right for _, right in stacked.values())]).double()
    owners = torch.tensor([k for k, (_, own) in stacked.items() for _ in range(len(own))], dtype=torch.long)
    part = torch.eye(count + 1, dtype=torch.float64)
    of_columns, of_dense = part[owners], part[dense]  # (R, K + 1), (D, K + 1): which part each belongs to
    inner = of_columns.T @ ((left.T @ left) * (right @ right.T)) @ of_columns
    for rows in _blocks(start, 8 * len(dense)) if dense else ():
        block = torch.stack(  # (D, rows, n)
            [start[rows].double() if k == count else _change(values[k], start, rows, torch.float64) for k in dense]
        )
        across = of_dense.T @ ((block @ right.T) * left[rows]).sum(1) @ of_columns
        inner += of_dense.T @ (block.flatten(1) @ block.flatten(1).T) @ of_dense + across + across.T
    change = torch.cat([part[:count, :count], shrunk[:, None]], 1)  # (K, K + 1)
    return change @ inner @ change.T


def _change(value: Tensor | Factors, start: Tensor, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows of a client's change, as a new tensor (rows, n); a change in factors becomes float32."""
    if isinstance(value, Factors):
        return Factors(value.decay, [(left[rows], right) for left, right in value.terms]).change(start[rows])
    return _matrix(value)[rows].to(dtype) - start[rows].to(dtype)


def _matrix(tensor: Tensor) -> Tensor:
    """A view of a tensor of any shape as a matrix (first dimension, product of the others)."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _blocks(start: Tensor, num_bytes: int) -> Iterator[slice]:
    """Slices of rows: at most BLOCK bytes each, at ``num_bytes`` per coordinate, but at least one row."""
    step = max(1, BLOCK // max(1, num_bytes * start.shape[1]))
    return (slice(first, first + step) for first in range(0, len(start), step))
