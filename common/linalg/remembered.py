"""Results that depend on a state's tensor, and at most on a basis: computed once a round, not once an update.

They are kept for as long as the tensor lives and nothing is written into it, for the last basis alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_KNOWN = WeakIdKeyDictionary()  # by tensor: function -> (count of writes into the tensor, basis, result)


def square_norm(tensor: Tensor) -> float:
    """Squared L2 norm of a tensor."""
    return float(_once(tensor, None, _square))


def times_right(weight: Tensor, basis: Tensor) -> Tensor:
    """W P^T (m, r) in float32, of a weight (m, n) and a basis (r, n)."""
    return _once(weight, basis, _times_right)


def times_left(weight: Tensor, basis: Tensor) -> Tensor:
    """P^T W (r, n) in float32, of a weight (m, n) and a basis (m, r)."""
    return _once(weight, basis, _times_left)


def _square(tensor: Tensor, _: None) -> Tensor:
    # In float32 the norms of rows are exact enough; the norm of the whole loses its fourth digit.
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    norms: Tensor = torch.linalg.vector_norm(rows.to(torch.float32), dim=1)
    return norms.double().square().sum()


def _times_right(weight: Tensor, basis: Tensor) -> Tensor:
    return weight.to(torch.float32) @ basis.T


def _times_left(weight: Tensor, basis: Tensor) -> Tensor:
    return basis.T @ weight.to(torch.float32)


def _once(tensor: Tensor, basis: Tensor | None, compute: Callable[[Tensor, Any], Tensor]) -> Tensor:
    if tensor.is_inference():  # writes into it are not counted
        return compute(tensor, basis)
    known, writes = _KNOWN.setdefault(tensor, {}), tensor._version
    if compute not in known or known[compute][0] != writes or known[compute][1] is not basis:
        known[compute] = writes, basis, compute(tensor, basis)
    found: Tensor = known[compute][2]
    return found
