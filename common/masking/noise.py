"""Noise that the sites of a masked sum share: each adds a part, and only the sum has enough (decision 034).

A site clips its update so that rounding cannot lengthen it beyond its clipping norm, encodes it as integers, and adds a
discrete Gaussian to each before it masks them. Discrete, because only integers can be masked, and because
floating-point noise reveals its own last bits (Mironov, CCS 2012).
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from common.errors import PolicyError
from common.masking.fixed_point import Words, encode, step

Source = Callable[[int], bytes]  # so many random bytes
LEAST_STD = 2**10  # for a part of the noise, in steps of the grid: what is told of its cost holds from there on
_CHUNK = 2**15  # numbers at a time: what a core's cache holds
_TAKEN = 1.5  # proposals for each number; 1.40 are needed on average
_UNSURE = 2.0**-44  # the error of a probability in float64 is far below
_MORE_BYTES = 24  # with a word's 8: 256 bits decide what float64 cannot
_MARGIN = 1e-9  # share of the clipping norm, above the error of a norm in float64


def _cumulative() -> list[int]:
    """P(w <= k) for k = 0, 1, ... in units of 2^-256, where w >= 0 has a probability proportional to exp(-w^2 / 2)."""
    with localcontext() as context:
        context.prec = 100
        terms = [(-Decimal(k * k) / 2).exp() for k in range(30)]
        shares = [sum(terms[: k + 1]) / sum(terms) for k in range(30)]
        return [t for share in shares if (t := int(share * 2**256)) < 2**256 - 1]


_EXACT = _cumulative()
_WORDS = np.array([t >> 192 for t in _EXACT], np.uint64)  # their first 64 bits


def secure_source() -> Source:
    """A cryptographic generator with a new seed of the operating system: ChaCha20 with a key of 256 bits."""
    stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), None).encryptor()
    return lambda size: stream.update(bytes(size))


@dataclass(frozen=True)
class Numbers:
    """Some numbers of an update that have one bound.

    Attributes:
        bound: largest absolute value, positive.
        count: how many there are.
        values: gives them; called twice, so that only some are in memory.
        open: they depend on no row, so they are neither clipped together with the others nor noised.
    """

    bound: float
    count: int
    values: Callable[[], npt.NDArray[np.floating]]
    open: bool = False

    def part(self, noise: float) -> float:
        """The part of the noise that they get."""
        return 0.0 if self.open else noise


def encode_hidden(
    update: Sequence[Numbers],
    weight: float,
    clients: int,
    noise: float = 0.0,
    clip: float | None = None,
    source: Source | None = None,
) -> tuple[Words, int]:
    """Encode a site's update with its part of the shared noise, to be masked.

    Args:
        update: all numbers.
        weight: the site's weight, from 0 to 1.
        clients: number of sites whose vectors are added.
        noise: standard deviation of a site's part, `secure_aggregation.noise`; 0: none.
        clip: L2 norm to which the site clips its update; None: it is not clipped, and noise only hides the others.
        source: generator; None: a new secure one.

    Returns:
        The words, and how many numbers were beyond their bounds.

    Raises:
        PolicyError: the weight is above 1, or the grid is too coarse for the noise or the clipping norm.
    """
    if not 0 <= weight <= 1:
        raise PolicyError(f"this site's weight in a masked sum is {weight:g}; allowed: 0 to 1")
    source, kept = source or secure_source(), 1.0 if clip is None else _kept(update, clients, noise, clip)
    words, beyond, at = np.empty(sum(some.count for some in update), np.uint32), 0, 0
    for some in update:
        values, part = some.values(), some.part(noise)
        if not some.open:  # not finite: nothing is sent of it
            values = values * kept if kept > 0 else np.zeros(some.count)
        encoded, clipped = encode(values, some.bound, weight, clients, part)
        if part:
            add_noise(encoded, steps_of(part, step(some.bound, clients, part)), source)
        words[at : at + some.count] = encoded
        beyond, at = beyond + clipped, at + some.count
    return words, beyond


def check_hidden(update: Sequence[Numbers], clients: int, noise: float, clip: float | None) -> None:
    """Refuse an update that ``encode_hidden`` would, before it is made; values are not looked at.

    Raises:
        PolicyError: the grid is too coarse for the noise or the clipping norm.
    """
    for some in update:
        if part := some.part(noise):
            steps_of(part, step(some.bound, clients, part))
    if clip is not None:
        _limit(update, clients, noise, clip)


def _kept(update: Sequence[Numbers], clients: int, noise: float, clip: float) -> float:
    """The share of an update that is kept, so that it is no longer than ``clip`` even when it is rounded; 0: none.

    A weight of at most 1 may be multiplied before the update is rounded.

    Raises:
        PolicyError: rounding alone may be longer.
    """
    limit = _limit(update, clients, noise, clip)
    with np.errstate(over="ignore", invalid="ignore"):
        hidden = [some for some in update if not some.open]
        norm = math.hypot(*(float(np.linalg.norm(np.asarray(some.values(), np.float64))) for some in hidden))
    if not math.isfinite(norm):
        return 0.0
    return min(1.0, limit * (1 - _MARGIN) / norm) if norm > 0 else 1.0


def _limit(update: Sequence[Numbers], clients: int, noise: float, clip: float) -> float:
    """The norm that rounding, of each number by half a step of its grid at most, cannot lengthen beyond ``clip``."""
    hidden = [some for some in update if not some.open]
    limit = clip - math.sqrt(sum(some.count * step(some.bound, clients, noise) ** 2 for some in hidden)) / 2
    if limit <= 0:
        raise PolicyError(
            f"this site's privacy: `clip` is {clip:g}, but rounding to the steps of the masked numbers may change an "
            f"update by {clip - limit:.3g}"
        )
    return limit


def steps_of(std: float, grid: float) -> int:
    """A standard deviation in steps of the grid, rounded up.

    Raises:
        PolicyError: the grid is coarser than the accounting allows.
    """
    steps = math.ceil(std / grid)
    if steps < LEAST_STD:
        raise PolicyError(
            f"this site's privacy: `secure_aggregation.noise` is {std:g}, {steps} steps of the masked numbers; allowed "
            f"with `noise` shared: {LEAST_STD} and more"
        )
    return steps


def add_noise(words: Words, std: int, source: Source | None = None) -> None:
    """Add a discrete Gaussian to every number, modulo 2^32 and in place.

    Args:
        words: encoded numbers, flat.
        std: standard deviation in steps of the grid.
        source: generator; None: a new secure one.
    """
    source = source or secure_source()
    for begin in range(0, words.size, _CHUNK):
        part = words[begin : begin + _CHUNK]
        part += discrete_gaussian(part.size, std, source).astype(np.uint32)


def discrete_gaussian(count: int, std: int, source: Source) -> npt.NDArray[np.int64]:
    """Draw integers n with probability proportional to exp(-n^2 / (2 std^2)), exactly but for 2^-250.

    Karney's rejection (arXiv 1303.6257, algorithm D) for |n| = w std + r with 0 <= r < std: w has a probability
    proportional to exp(-w^2 / 2), r and the sign are uniform, and the proposal is taken with probability
    exp(-f (w + f / 2)), f = r / std. A uniform word of 64 bits is compared with that probability in float64. Where
    both are too close to tell, 192 bits more and a hundred digits decide. So no error of float64 reaches a result.

    Args:
        count: how many.
        std: at least 1; for large values the standard deviation of n. At most 2^31.
        source: generator of random bytes.
    """
    found = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        kept = _proposed(int(_TAKEN * (count - filled)) + 8, std, source)[: count - filled]
        found[filled : filled + len(kept)] = kept
        filled += len(kept)
    return found


def _proposed(count: int, std: int, source: Source) -> npt.NDArray[np.int64]:
    """The taken ones of so many proposals."""
    first, second, third = np.frombuffer(source(24 * count), "<u8").reshape(3, count)
    whole = np.searchsorted(_WORDS, first, side="right")
    for i in np.flatnonzero(first == _WORDS[np.maximum(whole, 1) - 1]):  # equal in all 64 bits
        whole[i] = bisect_right(_EXACT, _longer(first[i], source))
    negative, drawn = (second >> np.uint64(63)).astype(bool), (second & np.uint64(2**63 - 1)).astype(np.int64)
    rest = drawn % std
    fraction = rest / std
    above = np.exp(-fraction * (whole + fraction / 2)) - third * 2.0**-64
    taken = above > 0
    for i in np.flatnonzero(np.abs(above) < _UNSURE):
        taken[i] = _below(_longer(third[i], source), int(whole[i]), int(rest[i]), std)
    taken &= drawn < 2**63 // std * std  # else small remainders would be likelier
    size = whole * std + rest
    taken &= ~(negative & (size == 0))  # 0 has one sign only
    return np.where(negative, -size, size)[taken]


def _longer(word: np.uint64, source: Source) -> int:
    """A uniform number of 256 bits that begins with this word."""
    return int(word) << 192 | int.from_bytes(source(_MORE_BYTES), "little")


def _below(uniform: int, whole: int, rest: int, std: int) -> bool:
    """Whether a uniform number of 256 bits, as a fraction, is below exp(-f (w + f / 2)) with f = rest / std."""
    with localcontext() as context:
        context.prec = 100
        return Decimal(uniform) / 2**256 < (-Decimal(rest * (2 * whole * std + rest)) / (2 * std * std)).exp()
