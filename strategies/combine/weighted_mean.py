"""Running sums over the clients' updates: the weighted mean, and the drift between clients.

Each update is added and then freed, so memory does not grow with the number of clients (decision 008).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.errors import AggregationError
from common.linalg.remembered import square_norm
from common.linalg.subspace import projects_right
from common.model.second_moments import without
from common.protocol.factors import Factors, inner_products
from common.protocol.tensors import Tensors

Changed = Mapping[str, Tensor | Factors]
Means = dict[str, Tensor | Factors]
_PENDING = 4  # beside a dense sum, factors may take this part of the sum's memory
_LEAST_DECAY = 1e-9  # by which a difference of squares may be divided
_TOGETHER = 8  # updates whose inner products with the base are computed together
NO_UPDATE = "no update to average: every client failed or was refused"


class WeightedMean:
    """Running example-weighted mean of tensors, as a change relative to a base (arXiv 2410.23111, section 3).

    Sums ``n_k (W_k - W_0)`` in float32 and returns ``W_0 + sum / n`` in the base's dtype, so equal tensors average
    to themselves bit for bit. Changes that come in factors stay in factors as long as all factors together are
    smaller than the weight, so memory is bounded for any number of clients.
    """

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self._base = base
        self._sums: dict[str, _Sum] = {}
        self._weight = 0

    def fold(self, tensors: Changed, num_examples: int) -> None:
        """Add one client's tensors (shapes as in the base), or factors of the changes, with weight ``num_examples``."""
        for name, value in tensors.items():
            if name not in self._sums:
                self._sums[name] = _Sum(self._base[name])
            self._sums[name].add(value, float(num_examples))
        self._weight += num_examples

    def means(self) -> Means:
        """The weighted mean by name: a dense tensor, or the mean change in factors where the sum is still in factors.

        Raises:
            AggregationError: ``fold`` was never called.
        """
        if self._weight == 0:
            raise AggregationError(NO_UPDATE)
        return {name: total.mean(float(self._weight)) for name, total in self._sums.items()}


def applied(means: Changed, base: Mapping[str, Tensor]) -> Tensors:
    """The means as dense tensors in the base's dtypes: a mean change in factors is applied to the base."""
    return {
        name: value.apply(base[name]).to(base[name].dtype) if isinstance(value, Factors) else value
        for name, value in means.items()
    }


class _Sum:
    """Weighted sum of one tensor's changes, in factors while the factors are smaller than the tensor.

    Later factors are collected, too, and added to the dense sum by one product for several clients.
    """

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self._whole: Tensor | None = None
        # The rest of the sum, beside ``_whole``; the decay is 1 + sum of w_k (c_k - 1).
        self._factors = Factors(1.0, [])
        self._inner: float | None = 0.0  # ``Factors.inner`` of all factors so far; None: of some it was not told

    @property
    def dense(self) -> bool:
        """Whether the sum is no longer in factors."""
        return self._whole is not None

    def add(self, value: Tensor | Factors, weight: float, inner: float | None = None) -> None:
        """Add one client's change; ``inner``: ``Factors.inner`` of it, which a later ``square`` needs not compute."""
        self._inner = None if inner is None or self._inner is None else self._inner + weight * inner
        if isinstance(value, Tensor):
            self._densify().add_(_change(value, self._base), alpha=weight)
            return
        terms = value.scaled(self._base.shape, weight).terms
        terms = self._joined(terms[0]) if value.common else self._factors.terms + terms
        common = value.common and len(terms) == 1
        self._factors = Factors(self._factors.decay + weight * (value.decay - 1.0), terms, common)
        most = self._base.numel() if self._whole is None else self._base.numel() // _PENDING
        if sum(r.shape[0] for _, r in terms) * sum(self._base.shape) >= most:
            self._densify()

    def _joined(self, more: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The terms with one more in a shared basis: where the basis is that of a term, the other factors are added.

        Updates of one version have one basis; beside updates of earlier versions there are several.
        """
        terms, (left, right) = list(self._factors.terms), more
        on_right = projects_right(self._base.shape)
        for position, (there_left, there_right) in enumerate(terms):
            basis, there = (right, there_right) if on_right else (left, there_left)
            if basis is there or torch.equal(basis, there):
                terms[position] = (there_left + left, right) if on_right else (left, there_right + right)
                return terms
        return [*terms, more]

    def mean(self, weight: float) -> Tensor | Factors:
        """The mean; the sum ends with it, because its memory is used for the result."""
        if self._whole is None:
            return self._factors.scaled(self._base.shape, 1.0 / weight)
        whole, shrunk = self._densify(), self._factors.decay - 1.0
        self._whole = None
        if shrunk:
            whole.add_(self._base, alpha=shrunk)
        return whole.div_(weight).add_(self._base).to(self._base.dtype)

    def square(self) -> float:
        """Squared Frobenius norm of the sum."""
        if self._whole is None:
            return self._factors.square(self._base, self._inner)
        whole, shrunk = self._densify(), self._factors.decay - 1.0
        square = square_norm(whole)
        if shrunk:
            inner = torch.linalg.vecdot(self._base.to(torch.float32), whole).sum(dtype=torch.float64)
            square += shrunk * (2 * float(inner) + shrunk * square_norm(self._base))
        return square

    def _densify(self) -> Tensor:
        """The sum without decay as a dense tensor; the factors in it are let go."""
        if self._factors.terms:
            left, right = self._factors.stacked(tuple(self._base.shape))
            self._whole = left @ right if self._whole is None else self._whole.addmm_(left, right)
            self._factors = Factors(self._factors.decay, [])
        elif self._whole is None:
            self._whole = torch.zeros(self._base.shape)
        return self._whole


class Drift:
    """Norms and mean pairwise cosine of the clients' changes, per layer group, without keeping the updates.

    The mean pairwise cosine of unit vectors u_k is ``(|sum u_k|^2 - K) / (K (K - 1))``, so one running sum is enough.
    """

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self._base = base
        self._units: dict[str, dict[str, _Sum]] = {}
        self._norms: dict[str, list[float]] = {}
        self._pending: list[Changed] = []

    def fold(self, tensors: Changed, norms: Mapping[str, float] | None = None) -> None:
        """Add one client's tensors, or factors of the changes; second moments are left out.

        Args:
            tensors: the tensors, or factors, by name.
            norms: the norms of their changes, where they are known: with own bases and weight decay a norm costs as
                much as the mean.
        """
        if norms:
            self._add(tensors, {}, norms)
            return
        self._pending.append(tensors)
        if not any(_meets_base(value) for value in tensors.values()) or len(self._pending) == _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        """Add the updates that wait for others with which they share a product."""
        pending, self._pending = self._pending, []
        inner: list[dict[str, float]] = [{} for _ in pending]
        for name in pending[0] if pending else ():
            meeting = [
                (k, v) for k, one in enumerate(pending) if isinstance(v := one[name], Factors) and _meets_base(v)
            ]
            products = inner_products([value for _, value in meeting], self._base[name]) if meeting else []
            for (k, _), product in zip(meeting, products, strict=True):
                inner[k][name] = product
        for tensors, known in zip(pending, inner, strict=True):
            known |= {
                n: v.inner(self._base[n])
                for n, v in tensors.items()
                if isinstance(v, Factors) and v.common and v.decay != 1.0
            }
            norms = {n: math.sqrt(change_square(tensors[n], self._base[n], known.get(n))) for n in without(tensors)}
            self._add(tensors, known, norms)

    def _add(self, tensors: Changed, inner: Mapping[str, float], norms: Mapping[str, float]) -> None:
        groups: dict[str, list[str]] = {}
        for name in without(tensors):
            groups.setdefault(layer_group(name), []).append(name)
        for group, names in groups.items():
            norm = math.sqrt(sum(norms[name] ** 2 for name in names))
            self._norms.setdefault(group, []).append(norm)
            units = self._units.setdefault(group, {})
            for name in names if norm > 0 else []:
                total, value = units.setdefault(name, _Sum(self._base[name])), tensors[name]
                found = inner.get(name)
                if found is None and not total.dense:
                    found = _inner_in(value, norms[name], self._base[name])
                total.add(value, 1.0 / norm, found)

    def diagnostics(self) -> dict[str, float]:
        """``client-norm/<group>``: mean L2 norm; ``client-cosine/<group>`` when at least two clients moved."""
        self._flush()
        result = {}
        for group, norms in self._norms.items():
            result[f"client-norm/{group}"] = sum(norms) / len(norms)
            k = sum(n > 0 for n in norms)
            if k > 1:
                square = sum(units.square() for units in self._units[group].values())
                result[f"client-cosine/{group}"] = (square - k) / (k * (k - 1))
        return result


def _inner_in(value: Tensor | Factors, norm: float, base: Tensor) -> float | None:
    """``Factors.inner`` of a change whose norm is known: the norm's square is linear in it. None: it is not to be had.

    A sum's square takes it times the decay that it is divided by here, so nothing is lost by the difference.
    """
    if not isinstance(value, Factors) or abs(shrunk := value.decay - 1.0) < _LEAST_DECAY:
        return None
    rest = replace(value, decay=1.0).square(base) + shrunk * shrunk * square_norm(base)
    return (norm * norm - rest) / (2 * shrunk)


def _meets_base(value: Tensor | Factors) -> bool:
    """Whether the norm of a change needs a product with the base that no other client shares."""
    return isinstance(value, Factors) and value.decay != 1.0 and not value.common


def layer_group(name: str) -> str:
    """The transformer block that a tensor belongs to, ``"...layers.7"``; outside all blocks: the tensor's module."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0] or name


def _change(value: Tensor, base: Tensor) -> Tensor:
    """``value - base`` as a new float32 tensor."""
    return value.to(torch.float32) - base.to(torch.float32)


def change_square(value: Tensor | Factors, base: Tensor, inner: float | None = None) -> float:
    """Squared Frobenius norm of a change; ``inner``: see ``Factors.square``."""
    if isinstance(value, Factors):
        return value.square(base, inner)
    return float(_change(value, base).square_().sum(dtype=torch.float64))
