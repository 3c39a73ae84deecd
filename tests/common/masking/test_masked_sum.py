"""The oracle: the unmasked sum is the survivors' own, whoever drops out and when; and no vector is seen."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import chi2

from common.errors import AggregationError
from common.masking import primitives
from common.masking.fixed_point import WORD_BYTES, Words, decode, encode, encoded_weight, largest
from common.masking.parts import SumId
from common.masking.site import pair_key, self_key
from tests.harness.masking import ABOUT, Together, uniform


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, list[set[int]]]:
    """Members, threshold, and who is lost at each of the four exchanges, so that the threshold is left."""
    threshold = draw(st.integers(2, 5))
    count = draw(st.integers(threshold, 2 * threshold - 1))
    order, left, lost = draw(st.permutations(range(count))), count - threshold, []
    for _ in range(4):
        gone = draw(st.integers(0, left))
        lost.append(set(order[left - gone : left]))
        left -= gone
    return count, threshold, lost


@settings(max_examples=25, deadline=None)
@given(case=rounds(), words=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_sum_is_that_of_the_survivors_whoever_is_lost_and_when(
    case: tuple[int, int, list[set[int]]], words: int, seed: int
) -> None:
    count, threshold, lost = case
    vectors = uniform(seed, count, words)
    together = Together(count, threshold, words)
    together.share(lost[0])
    together.mask(vectors, lost[1])
    together.sign(lost[2])
    total = together.unmask(lost[3])
    alive = [v for k, v in enumerate(vectors) if k not in lost[0] | lost[1]]
    assert np.array_equal(total, np.sum(alive, axis=0, dtype=np.uint32))


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 60),
    bound=st.floats(1e-6, 1e3),
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=60),
    seed=st.integers(0, 2**16),
    size=st.floats(0.01, 1.0),
)
def test_decoded_mean_is_the_float64_mean(
    clients: int, bound: float, weights: list[float], seed: int, size: float
) -> None:
    weights = weights[:clients]
    numbers = np.random.default_rng(seed).uniform(-size * bound, size * bound, (len(weights), 50))
    encoded = [encode(row, bound, weight, clients) for row, weight in zip(numbers, weights, strict=True)]
    assert [clipped for _, clipped in encoded] == [0] * len(weights)
    total = np.sum([words for words, _ in encoded], axis=0, dtype=np.uint32)
    want = np.array(weights) @ numbers / sum(weights)
    step = bound * clients / 2**30 / sum(weights)  # of the grid, at most
    assert np.abs(decode(total, bound, sum(weights), clients) - want).max() <= step * len(weights)


def test_the_largest_sum_does_not_overflow() -> None:
    for clients in (1, 3, 10, 50, 1000):
        words, clipped = encode(np.array([9.0, -9.0, np.inf, np.nan, 2.0, -2.0]), 2.0, 1.0, clients)
        assert clipped == 4
        total = np.sum([words] * clients, axis=0, dtype=np.uint32)
        exact = clients * largest(clients)
        assert total.view(np.int32).tolist() == [exact, -exact, exact, 0, exact, -exact]
        assert clients * encoded_weight(1.0, clients) == exact <= 2**31 - 1


def test_too_few_at_the_end_give_no_sum() -> None:
    together = Together(4, 3, 5)
    together.share()
    together.mask(uniform(0, 4, 5))
    together.sign()
    with pytest.raises(AggregationError, match="2 sites have given their shares, 3 needed to unmask the sum"):
        together.unmask(lost={0, 1})


WORDS = 4096
PLAIN = [np.zeros(WORDS, np.uint32), np.full(WORDS, 2**31, np.uint32), np.arange(WORDS, dtype=np.uint32)]


def looks_uniform(words: Words) -> bool:
    """Chi-square of the bytes, at a level of 1e-9, and no trend along the vector."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    if ((counts - counts.mean()) ** 2 / counts.mean()).sum() > chi2.isf(1e-9, 255):
        return False
    return bool(abs(np.corrcoef(words.astype(float), np.arange(len(words)))[0, 1]) < 0.1)


def test_masked_vectors_are_uniform_whatever_is_masked() -> None:
    assert not any(map(looks_uniform, PLAIN))
    together = Together(3, 2, WORDS)
    together.share()
    masked = together.mask(PLAIN)
    assert all(map(looks_uniform, masked))
    assert all(looks_uniform(seen - own) for own, seen in zip(PLAIN, masked, strict=True))
    assert not looks_uniform(masked[0] + masked[1] + masked[2] - sum(self_masks(together)))  # the sum of PLAIN


def self_masks(together: Together) -> list[Words]:
    found = []
    for member, site in zip(together.ids, together.sites, strict=True):
        found.append(np.zeros(WORDS, np.uint32))
        primitives.add_mask(found[-1], self_key(together.sum_id, member, site._self_seed))
    return found


@pytest.mark.parametrize("unknown", ["self", 1, 2])
def test_one_unknown_seed_hides_the_vector(unknown: object) -> None:
    """Whoever knows every secret of site 0 but one seed sees uniform words, whatever the vector is; with all, it."""
    for plain in PLAIN:
        together = Together(3, 2, WORDS)
        together.share()
        left = together.mask([plain] * 3)[0]
        site, own, listing = together.sites[0], together.ids[0], together.server.listing
        keys = {"self": (self_key(together.sum_id, own, site._self_seed), True)}
        for k in (1, 2):
            key = pair_key(together.sum_id, site._mask_key, own, listing, together.ids[k], ABOUT)
            keys[k] = key, together.ids[k] > own  # type: ignore[index]
        last, negative = keys.pop(unknown)  # type: ignore[call-overload]
        for known, subtract in keys.values():
            primitives.add_mask(left, known, negative=subtract)
        assert looks_uniform(left)
        assert looks_uniform(left - plain)
        primitives.add_mask(left, last, negative=negative)
        assert np.array_equal(left, plain)


def test_one_share_less_than_the_threshold_fits_any_secret() -> None:
    """Lagrange in the field of pycryptodome: T - 1 shares and any further one give some seed, another for each."""
    secret = primitives.new_seed()
    shares = dict(enumerate(primitives.split(secret, 3, 5), start=1))
    assert primitives.combined({k: shares[k] for k in (1, 3, 5)}) == secret
    found = {primitives.combined({1: shares[1], 3: shares[3], 5: bytes([b]) * 16}) for b in range(64)}
    assert len(found) == 64


def test_sites_that_were_sent_different_states_have_no_sum() -> None:
    """Else a server could have all others train a state whose update is zero, and see the update of the last."""
    together = Together(3, 2, 8)
    together.share()
    vectors = uniform(0, 3, 8)
    for k, site in enumerate(together.sites):
        site.receive(together.server.shares_for(together.ids[k]))
        masked = site.mask(vectors[k].copy(), b"another" if k == 0 else ABOUT)
        together.server.add_vector(together.ids[k], masked)
    together.sign()
    assert not np.array_equal(together.unmask(), np.sum(vectors, axis=0, dtype=np.uint32))


def test_masks_differ_between_rounds_attempts_and_pairs() -> None:
    seen = set()
    for number, attempt in ((1, 0), (1, 1), (2, 0)):
        together = Together(3, 2, 4, SumId(run=1, server_round=number, attempt=attempt, threshold=2))
        together.share()
        seen |= {tuple(one.tolist()) for one in together.mask([np.zeros(4, np.uint32)] * 3)}
    assert len(seen) == 9


def test_server_holds_one_vector_whatever_the_number_of_members() -> None:
    words = 2**18
    together = Together(9, 5, words)
    together.share()
    tracemalloc.start()
    try:
        for k, site in enumerate(together.sites):
            site.receive(together.server.shares_for(together.ids[k]))
            together.server.add_vector(together.ids[k], site.mask(np.full(words, k, np.uint32), ABOUT))
        together.sign()
        total = together.unmask()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert set(total.tolist()) == {36}
    assert held < WORD_BYTES * words  # the sum was there before; the vectors are gone
    assert peak < 4 * WORD_BYTES * words  # a member's own, and chunks of a mask
