"""Gram matrices, with half of the products."""

from torch import Tensor

TILE = 256  # columns that are computed together


def gram(matrix: Tensor) -> Tensor:
    """``matrix.T @ matrix``; blocks below the diagonal are copied from those above."""
    columns = matrix.shape[1]
    result = matrix.new_empty(columns, columns)
    for start in range(0, columns, TILE):
        rows = slice(start, start + TILE)
        result[rows, start:] = matrix[:, rows].T @ matrix[:, start:]
        result[start + TILE :, rows] = result[rows, start + TILE :].T
    return result
