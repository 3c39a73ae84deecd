"""Fixed point: numbers within a bound as integers modulo 2^32, whose sum over all clients cannot overflow.

With N clients, weights up to 1 and numbers x up to a bound b, a client sends round(x w L / b) with L = (2^31 - 1) // N.
The sum is at most 2^31 - 1, so as a signed integer it is exact; a number takes four bytes, as in float32. The error of
a mean is about b N / 2^31 sqrt(N / 12) / (sum of weights).

Where each client adds noise of standard deviation s, L is smaller: (2^31 - 1) // (N + 11 sqrt(N) s / b). So a sum of
4 * 10^9 numbers, each with noise of 11 standard deviations to spare, overflows in one case of 10^16.
"""

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
WORD_BYTES = 4
_LARGEST = 2**31 - 1
_DEVIATIONS = 11.0  # 2 * 2^32 exp(-11^2 / 2) < 10^-16


def largest(clients: int, noise: float = 0.0) -> int:
    """L, the largest integer that one of so many clients sends; the noise is given in units of the bound."""
    return int(_LARGEST / (clients + _DEVIATIONS * math.sqrt(clients) * noise)) if noise else _LARGEST // clients


def step(bound: float, clients: int, noise: float = 0.0) -> float:
    """The number that the integer 1 stands for."""
    return bound / largest(clients, noise / bound)


def encode(
    values: npt.NDArray[np.floating], bound: float, weight: float, clients: int, noise: float = 0.0
) -> tuple[Words, int]:
    """Encode numbers; those beyond the bound are clipped to it.

    Args:
        values: numbers of any shape; not finite ones count as clipped, NaN becomes 0.
        bound: largest absolute value, positive.
        weight: the client's weight, from 0 to 1.
        clients: number of clients whose vectors are added.
        noise: standard deviation of the noise that each client will add; it only makes the integers smaller.

    Returns:
        The encoded numbers, flat, and how many were clipped.
    """
    exact = np.asarray(values, np.float64).reshape(-1)
    within = np.clip(np.nan_to_num(exact, nan=0.0), -bound, bound)
    clipped = int(np.count_nonzero(within != exact))
    scaled = np.rint(within * (weight / step(bound, clients, noise)))
    return scaled.astype(np.int32).view(np.uint32), clipped


def decode(total: Words, bound: float, weights: float, clients: int, noise: float = 0.0) -> npt.NDArray[np.float64]:
    """The weighted mean of the encoded numbers: the sum, decoded and divided by the sum of the ``weights``."""
    return total.view(np.int32).astype(np.float64) * (step(bound, clients, noise) / weights)


def encoded_weight(weight: float, clients: int) -> int:
    """A weight as an encoded number; the sum of all weights travels beside the vector, and shows a false mask."""
    return int(encode(np.array([weight]), 1.0, 1.0, clients)[0][0])
