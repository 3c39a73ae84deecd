"""Discrete Gaussian noise, and the cost of its sum, against independent computations."""

import math
from decimal import Decimal, getcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import chi2, chisquare, kstest

from client.privacy.guarantee import guarantee, honest_parts, most_sites
from common.accountant import cost, epsilon
from common.config.site import PrivacyConfig
from common.errors import PolicyError
from common.masking.fixed_point import Words, decode, encode, largest
from common.masking.noise import (
    _EXACT,
    LEAST_STD,
    Numbers,
    Source,
    add_noise,
    discrete_gaussian,
    encode_hidden,
    secure_source,
    steps_of,
)
from tests.harness.masking import Together

Floats = npt.NDArray[np.float64]


def seeded(seed: int) -> Source:
    return np.random.default_rng(seed).bytes


def probabilities(std: float, reach: int) -> Floats:
    """The definition, at -reach to reach."""
    weights = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * std**2))
    return weights / weights.sum()


def p_value(drawn: npt.NDArray[np.int64], std: float) -> float:
    """Chi-square of the drawn numbers against the definition; tails with fewer than 20 expected are pooled."""
    reach = math.ceil(10 * std)
    expected = probabilities(std, reach) * len(drawn)
    observed = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1)
    body = expected >= 20
    pooled = [np.append(of[body], of[~body].sum()) for of in (observed, expected)]
    return float(chisquare(*pooled).pvalue)


@pytest.mark.parametrize("std", [1, 2, 3, 11])
def test_numbers_are_drawn_as_the_definition_says(std: int) -> None:
    drawn = discrete_gaussian(300_000, std, seeded(std))
    assert p_value(drawn, std) > 1e-4
    assert p_value(drawn, std * 1.02) < 1e-9  # the test sees an error of two per cent,
    more_zeros = np.concatenate([drawn, np.zeros(int((drawn == 0).sum()) // 4, np.int64)])
    assert p_value(more_zeros, std) < 1e-9  # or a quarter too many zeros


@pytest.mark.parametrize("std", [2**10, 12_345_678, 2**26 + 1, 2**31])
def test_large_deviations_are_gaussian_down_to_the_last_bits(std: int) -> None:
    drawn = discrete_gaussian(200_000, std, seeded(std))
    assert kstest(drawn / std, "norm").pvalue > 1e-4
    assert kstest(drawn / (1.03 * std), "norm").pvalue < 1e-4
    assert chisquare(np.bincount(drawn & 63)).pvalue > 1e-4
    assert chi2.sf(((drawn / std) ** 2).sum(), len(drawn)) > 1e-4
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(len(drawn))


class Chosen:
    """A source of chosen 64-bit words for the first proposals; later ones are random."""

    def __init__(self, words: list[int], more: list[bytes]) -> None:
        self.words, self.more, self.rest = words, more, seeded(0)

    def __call__(self, size: int) -> bytes:
        if size == 24 and self.more:
            return self.more.pop(0)
        filled = np.frombuffer(self.rest(size), "<u8").reshape(3, -1).copy()
        if self.words:
            filled[:, 0], self.words = self.words, []
        return filled.tobytes()


def first(words: list[int], more: list[bytes], std: int) -> int:
    """The first number of a sampler that is given these words: the first that is taken."""
    source = Chosen(words, more)
    drawn = int(discrete_gaussian(1, std, source)[0])
    assert source.more == []
    return drawn


def test_a_word_that_does_not_tell_the_whole_part_is_continued() -> None:
    for k in (0, 3):
        word, rest = _EXACT[k] >> 192, _EXACT[k] & (2**192 - 1)
        low, high = ((rest + step).to_bytes(24, "little") for step in (-1, 1))
        assert first([word, 5, 0], [low], 1000) == 1000 * k + 5
        assert first([word, 5, 0], [high], 1000) == 1000 * (k + 1) + 5


def test_a_word_that_does_not_tell_whether_to_take_is_continued() -> None:
    getcontext().prec = 100
    std, whole, rest = 1000, 2, 700
    at = (-Decimal(rest * (2 * whole * std + rest)) / (2 * std * std)).exp()
    exact = int(at * 2**256)
    in_whole = (_EXACT[1] >> 192) + 2**60  # between P(w <= 1) and P(w <= 2)
    below, above = ((exact + step & (2**192 - 1)).to_bytes(24, "little") for step in (-5, 5))
    assert first([in_whole, rest, exact >> 192], [below], std) == whole * std + rest
    assert first([in_whole, rest, exact >> 192], [above], std) != whole * std + rest


def test_the_table_ends_where_nothing_is_left() -> None:
    total = sum(Decimal(-k * k / 2).exp() for k in range(40))
    for k, value in enumerate(_EXACT):
        share = sum(Decimal(-i * i / 2).exp() for i in range(k + 1)) / total
        assert abs(Decimal(value) / 2**256 - share) < Decimal(2) ** -80
    assert (Decimal(-((len(_EXACT) + 1) ** 2)) / 2).exp() < Decimal(2) ** -256


def test_a_secure_source_is_new_every_time() -> None:
    one, two = secure_source(), secure_source()
    assert len({one(32), one(32), two(32), two(32)}) == 4


def test_noise_is_added_modulo_the_word() -> None:
    words = np.full(70_000, 2**32 - 5, np.uint32)
    add_noise(words, 2000, seeded(1))
    moved = (words + np.uint32(5)).view(np.int32)
    assert kstest(moved / 2000, "norm").pvalue > 1e-4
    add_noise(words, 2000)
    assert ((words + np.uint32(5)).view(np.int32)).std() == pytest.approx(2000 * math.sqrt(2), rel=0.02)


def hidden(values: Floats, bound: float, *arguments: Any) -> tuple[Words, int]:
    """An update of one tensor."""
    return encode_hidden([Numbers(bound, values.size, lambda: values)], *arguments)


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), min_size=1, max_size=3),
    st.floats(1e-2, 1e3),
    st.floats(1e-3, 0.5),
    st.floats(1e-6, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_a_rounded_update_is_never_longer_than_the_clip(
    tensors: list[list[float]], clip: float, of_clip: float, weight: float
) -> None:
    arrays = [np.array(values, np.float32) for values in tensors]
    grids = [clip * of_clip / 3**k for k in range(len(arrays))]  # tensors have bounds, so grids, of their own
    update = [Numbers(g * largest(3), a.size, partial(np.array, a)) for g, a in zip(grids, arrays, strict=True)]
    limit = clip - math.sqrt(sum(a.size * g**2 for g, a in zip(grids, arrays, strict=True))) / 2
    if limit <= 0:
        with pytest.raises(PolicyError, match="rounding"):
            encode_hidden(update, weight, 3, 0.0, clip)
        return
    words, beyond = encode_hidden(update, weight, 3, 0.0, clip)
    assert beyond == 0
    parts = np.split(words.view(np.int32), np.cumsum([a.size for a in arrays])[:-1])
    square = sum(Decimal(g) ** 2 * sum(int(n) ** 2 for n in part) for g, part in zip(grids, parts, strict=True))
    assert square <= Decimal(clip) ** 2
    norm = math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))
    kept = weight * min(1.0, limit / norm) if norm else 0.0
    for g, array, part in zip(grids, arrays, parts, strict=True):  # all are scaled alike
        assert np.abs(part - kept * array / g).max() <= 0.5 + 1e-5 * np.abs(part).max()


def test_numbers_that_depend_on_no_row_are_exact_beside_the_noise() -> None:
    update = [
        Numbers(1.0, 4000, lambda: np.full(4000, 0.5)),
        Numbers(1e-3, 1, lambda: np.array([-7e-4]), open=True),
    ]
    words, beyond = encode_hidden(update, 0.5, 3, 2.0, 1e-2, seeded(3))
    assert np.array_equal(words[4000:], encode(np.array([-7e-4]), 1e-3, 0.5, 3)[0])
    assert beyond == 0
    assert decode(words[:4000], 1.0, 1.0, 3, 2.0).std() == pytest.approx(2.0, rel=0.1)


def test_a_deviation_is_rounded_up_and_a_coarse_grid_is_refused() -> None:
    assert steps_of(1.0, 1 / 5000.5) == 5001
    with pytest.raises(PolicyError, match="allowed with `noise` shared: 1024 and more"):
        steps_of(1.0, 1e-3)


def section(clip: float, noise_multiplier: float, colluders: int = 0, noise: str = "shared") -> PrivacyConfig:
    return PrivacyConfig(
        clip=clip, noise_multiplier=noise_multiplier, delta=1e-5, max_epsilon=1e9, noise=noise, colluders=colluders
    )


def test_every_site_together_has_what_local_noise_would_need_and_colluders_take_theirs_off() -> None:
    part = 2.7 * 0.5 / math.sqrt(7)
    found = guarantee(section(0.5, 2.7), 7, part)
    assert found.noise_multiplier == pytest.approx(2.7, rel=1e-5)
    assert found.worst_multiplier == pytest.approx(2.7 / math.sqrt(7), rel=1e-5)
    assert found.most_sites == 13  # two lists of 7 out of 14 need not have an honest site in common
    three = guarantee(section(0.5, 2.0, colluders=3), 7, part)
    assert three.noise_multiplier == pytest.approx(2.7 * math.sqrt(4 / 7), rel=1e-5)
    assert three.most_sites == 10
    for colluders in (6, 7, 99):  # only its own part is left, however many sites a round has
        alone = guarantee(section(0.5, 1.0, colluders=colluders), 7, part)
        assert alone.noise_multiplier == alone.worst_multiplier == found.worst_multiplier
        assert alone.most_sites is None


@pytest.mark.parametrize("threshold", range(2, 8))
def test_in_rounds_up_to_the_largest_no_two_lists_of_survivors_have_enough_signatures(threshold: int) -> None:
    """Every honest site signs one of two lists, every colluder both; the most that the shorter list can get."""

    def shorter(sites: int, colluders: int) -> int:
        return (sites - colluders) // 2 + colluders

    for colluders in range(threshold - 1):
        most = most_sites(threshold, colluders)
        assert shorter(most, colluders) < threshold <= shorter(most + 1, colluders)
        assert honest_parts(threshold, colluders) == threshold - colluders


def test_less_noise_than_the_site_asks_for_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"4 honest sites add up to 2\.041.*from 0\.675"):
        guarantee(section(0.5, 2.7, colluders=3), 7, 2.7 * 0.5 / math.sqrt(7))
    for threshold, part in ((None, 1.0), (7, 0.0)):
        with pytest.raises(PolicyError, match="allowed here: `noise` local"):
            guarantee(section(0.5, 2.7), threshold, part)
    local = guarantee(section(0.5, 2.7, noise="local"), None, 0.0)
    assert local.noise_multiplier == local.worst_multiplier == 2.7


def sum_of(parts: int, std: float) -> Floats:
    """The distribution of a sum of independent discrete Gaussians, by convolution; errors of a sum are below 1e-18."""
    reach = math.ceil(14 * std)
    one = probabilities(std, reach)
    if parts == 1:
        return one
    size = 1 << (2 * parts * reach + 1).bit_length()
    found = np.fft.irfft(np.fft.rfft(one, size) ** parts, size)[: 2 * parts * reach + 1]
    return np.maximum(found, 0.0)


def exact_delta(p: Floats, shift: int, eps: float) -> float:
    """The definition of delta for a sum and the same, shifted: sum of max(0, p(n) - e^eps p(n - shift))."""
    shifted = np.concatenate([np.zeros(shift), p])
    return float(np.maximum(np.concatenate([p, np.zeros(shift)]) - math.exp(eps) * shifted, 0.0).sum())


@pytest.mark.parametrize("parts", [1, 3, 10])
@pytest.mark.parametrize("multiplier", [1.5, 4.0])
def test_epsilon_of_a_round_holds_for_the_exact_sum_of_discrete_gaussians(multiplier: float, parts: int) -> None:
    """One direction, the coarsest allowed grid: delta is at most what it is said to be, and hardly less."""
    std = LEAST_STD
    clip = int(std * math.sqrt(parts) / multiplier)  # in steps
    found = guarantee(section(clip, multiplier * 0.99), parts, std)
    p = sum_of(parts, std)
    for delta in (1e-3, 1e-6):
        told = epsilon(cost(found.noise_multiplier), delta)
        assert 0.98 * delta < exact_delta(p, 2 * clip, told) <= delta
        own = epsilon(cost(found.worst_multiplier), delta)
        if parts > 1:
            assert exact_delta(p, 2 * clip, own) < delta / 10 < exact_delta(sum_of(1, std), 2 * clip, own) < delta


@pytest.mark.parametrize("rounds", [2, 5])
def test_epsilon_of_several_rounds_and_numbers_lies_within_the_privacy_loss_distribution(rounds: int) -> None:
    """Losses of independent rounds (or numbers: shifts differ) add up: their distributions are convolved, on a grid
    rounded up and rounded down, which brackets the truth."""
    parts, multiplier, std = 3, 6.0, LEAST_STD
    clip = int(std * math.sqrt(parts) / multiplier)
    p = sum_of(parts, std)
    kept = p > 1e-25
    shifts = [2 * clip] * (rounds - 1) + [
        int(1.2 * clip),
        int(1.6 * clip),
    ]  # the last round has two numbers, 2 clip long
    found = guarantee(section(clip, multiplier * 0.99), parts, std)
    step, size = 1e-4, 2**19
    values = (np.arange(size) - size // 2) * step
    deltas = []
    told = epsilon(rounds * cost(found.noise_multiplier), 1e-5)
    for rounding in (np.ceil, np.floor):
        transform = np.ones(size // 2 + 1, complex)
        for shift in shifts:
            # log p(n) - log p(n - shift), where p is known: the centre holds all but 1e-20 of it.
            n = np.flatnonzero(kept[shift:] & kept[:-shift]) + shift
            loss = np.log(p[n]) - np.log(p[n - shift])
            transform *= np.fft.rfft(np.bincount(rounding(loss / step).astype(int) % size, p[n], size))
        mass = np.roll(np.fft.irfft(transform, size), size // 2)
        deltas.append(float((np.maximum(1 - np.exp(told - values), 0.0) * mass)[values > told].sum()))
    upper, lower = deltas
    assert lower < upper < 1.03 * lower
    assert 0.97e-5 < upper
    assert lower <= 1e-5


@pytest.mark.parametrize(("multiplier", "rounds"), [(2.7, 5), (8.0, 50)])
def test_on_a_fine_grid_epsilon_is_opacus_gaussian_accountants(multiplier: float, rounds: int) -> None:
    from opacus.accountants import RDPAccountant

    found = guarantee(section(0.5, multiplier), 10, multiplier * 0.5 / math.sqrt(10))
    told = epsilon(rounds * cost(found.noise_multiplier), 1e-5)
    accountant = RDPAccountant()
    accountant.history = [(multiplier / 2, 1.0, rounds)]
    assert 0.9 * accountant.get_epsilon(1e-5) < told <= accountant.get_epsilon(1e-5)
    assert told == pytest.approx(epsilon(rounds * cost(multiplier), 1e-5), rel=1e-4)


@pytest.mark.parametrize("clients", [2, 10, 50])
@pytest.mark.parametrize("noise", [1e-3, 0.05, 30.0])
def test_the_sum_is_that_of_the_clipped_updates_with_the_noise_of_all_sites(clients: int, noise: float) -> None:
    bound, clip, count = 0.1, 0.8, 20_000
    generator = np.random.default_rng(clients)
    updates, weights = generator.normal(0, 0.01, (clients, count)), generator.uniform(0.1, 1.0, clients)
    total, source = np.zeros(count, np.uint32), seeded(clients)
    for update, weight in zip(updates, weights, strict=True):
        words, beyond = hidden(update, bound, weight, clients, noise, clip, source)
        total += words
        assert beyond == 0
    found = decode(total, bound, weights.sum(), clients, noise) * weights.sum()
    exact = weights @ (updates * np.minimum(1.0, clip / np.linalg.norm(updates, axis=1))[:, None])
    assert kstest((found - exact) / (noise * math.sqrt(clients)), "norm").pvalue > 1e-4
    assert (found - exact).std() == pytest.approx(noise * math.sqrt(clients), rel=0.02)


def test_a_sum_has_room_for_numbers_at_the_bound_and_eleven_deviations_of_the_noise() -> None:
    for clients in (1, 3, 50, 1000):
        for noise in (1e-4, 0.1, 10.0, 1e4):  # in units of the bound
            most = clients * largest(clients, noise) + 11 * math.sqrt(clients) * noise * largest(clients, noise)
            assert 0.999 * (2**31 - 1) - clients < most <= 2**31 - 1
    # Without that room sites at the bound, with noise of half of it, would have overflowed in places.
    clients, count, source = 3, 50_000, seeded(3)
    total = np.zeros(count, np.uint32)
    for _ in range(clients):
        total += hidden(np.full(count, 2.0), 2.0, 1.0, clients, 1.0, None, source)[0]
    found = decode(total, 2.0, 3.0, clients, 1.0)
    assert found.min() > 2.0 - 6 / math.sqrt(3)
    assert found.mean() == pytest.approx(2.0, abs=0.02)


def test_a_weight_above_one_or_a_grid_too_coarse_is_refused() -> None:
    with pytest.raises(PolicyError, match="allowed: 0 to 1"):
        hidden(np.ones(3), 1.0, 1.5, 3, 0.1, 1.0)
    with pytest.raises(PolicyError, match=r"`secure_aggregation\.noise` is 1e-06, .* steps"):
        hidden(np.ones(3), 1.0, 1.0, 3, 1e-6, 1.0)
    with pytest.raises(PolicyError, match="rounding to the steps"):
        hidden(np.ones(3), 1.0, 1.0, 3, 0.01, 1e-12)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e200])
def test_an_update_that_is_not_finite_counts_as_nothing(value: float) -> None:
    words, _ = hidden(np.array([1.0, value, 0.5, 2.0]), 1.0, 1.0, 3, 1.0, 1.0, seeded(0))
    noise, _ = hidden(np.zeros(4), 1.0, 1.0, 3, 1.0, 1.0, seeded(0))
    assert np.array_equal(words, noise)


def test_masks_and_drop_outs_leave_the_survivors_noise_in_the_sum() -> None:
    members, threshold, count, noise, clip = 5, 3, 30_000, 0.02, 0.5
    updates = np.random.default_rng(0).normal(0, 0.01, (members, count))
    source = seeded(9)
    vectors = [hidden(update, clip, 1.0, members, noise, clip, source)[0] for update in updates]
    together = Together(members, threshold, count)
    together.share(lost={4})
    together.mask(vectors, lost={1})
    together.sign()
    found = decode(together.unmask(), clip, 3.0, members, noise) * 3.0
    exact = sum(update * min(1.0, clip / float(np.linalg.norm(update))) for update in updates[[0, 2, 3]])
    assert kstest((found - exact) / (noise * math.sqrt(3)), "norm").pvalue > 1e-4
    assert kstest((found - exact) / (noise * math.sqrt(2)), "norm").pvalue < 1e-9
