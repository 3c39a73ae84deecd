"""Clipping, trimmed mean, median and Krum against dense arithmetic in float64, and against clients that lie."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import strategies
from common.config.aggregation import (
    AggregationConfig,
    KrumConfig,
    MeanConfig,
    MedianConfig,
    MultiKrumConfig,
    TrimmedMeanConfig,
)
from common.config.strategy import FedITConfig, FlexLoRAConfig
from common.errors import AggregationError
from common.linalg.subspace import SharedBasis, projects_right
from common.protocol.factors import Factors, num_bytes
from strategies.combine import robust
from strategies.combine.robust import Contribution, combine
from strategies.combine.weighted_mean import applied
from strategies.fedftg import FedFTGRule
from strategies.flower.named import make_rule, make_strategy
from strategies.rule import Tensors, Update
from tests.harness.rounds import aggregate, doubles

Shape = tuple[int, ...]
SHAPES: list[Shape] = [(60, 40), (40, 60), (7,)]  # a right and a left projection, and what has no factors
METHODS: dict[str, AggregationConfig] = {
    "mean, uniform, clipped": MeanConfig(weights="uniform", clip_norm=1.0),
    "mean, clipped": MeanConfig(clip_norm=1.0),
    "mean, clipped short": MeanConfig(clip_norm=0.3),
    "trimmed mean": TrimmedMeanConfig(trim=0.25),
    "trimmed mean, clipped": TrimmedMeanConfig(trim=0.1, clip_norm=0.5),
    "median": MedianConfig(),
    "median, clipped": MedianConfig(clip_norm=1.0),
    "krum": KrumConfig(byzantine=1),
    "multi-krum": MultiKrumConfig(byzantine=1),
}
IN_FACTORS = ["mean, clipped", "mean, clipped short", "krum", "multi-krum"]
Sent = tuple[Tensors, list[Contribution], np.ndarray]
every_method = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
kinds = st.lists(st.sampled_from(["factors", "decayed", "two bases", "dense"]), min_size=5, max_size=9)


def base(shapes: Sequence[Shape] = SHAPES, seed: int = 0, size: float = 1.0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.w": size * torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}


def contribution(k: int, kind: str, state: Tensors, seed: int, rank: int = 2) -> Contribution:
    """A client's change, of another size for every client; ``common``: all have the basis of one round."""
    g, size = torch.Generator().manual_seed(1000 * seed + k), 0.1 * (1 + k % 4)
    tensors: dict[str, torch.Tensor | Factors] = {}
    for name, start in state.items():
        if kind == "dense" or start.ndim != 2:
            tensors[name] = start + size * torch.randn(start.shape, generator=g)
            continue
        terms, r = [], min(rank, *start.shape)
        for _ in range(2 if kind == "two bases" else 1):
            left, right = torch.randn(len(start), r, generator=g), torch.randn(r, start.shape[1], generator=g)
            if kind.startswith("common") and projects_right(start.shape):
                right = SharedBasis(3, 1, r)(name, start.shape)
            elif kind.startswith("common"):
                left = SharedBasis(3, 1, r)(name, start.shape)
            terms.append((left, size * right) if right.shape[1] > len(left) else (size * left, right))
        decay = 1.0 - 0.01 * (1 + k % 3) if kind.endswith("decayed") else 1.0
        tensors[name] = Factors(decay, terms, common=kind.startswith("common"))
    return Contribution(f"site-{k}", 1 + 3 * k % 7, tensors)


def cohort(kinds: Sequence[str], state: Tensors, seed: int = 1, rank: int = 2) -> list[Contribution]:
    return [contribution(k, kind, state, seed, rank) for k, kind in enumerate(kinds)]


def in_factors(kind: str, state: Tensors) -> list[Update]:
    """Five clients' updates, as rules get them."""
    return [Update(c.client, c.num_examples, {}, None, dict(c.tensors)) for c in cohort([kind] * 5, state)]  # type: ignore[arg-type]


def melted(one: Contribution, state: Tensors) -> Contribution:
    """The same update as whole tensors."""
    change, first, whole = torch.from_numpy(flat_change(one, state)), 0, {}
    for name, start in state.items():
        part = change[first : first + start.numel()].reshape(start.shape)
        whole[name], first = (start.double() + part).float(), first + start.numel()
    return one._replace(tensors=whole)


def flat_change(one: Contribution, state: Tensors) -> np.ndarray:
    """All of a client's change in one vector, float64."""
    parts = []
    for name, start in doubles(state).items():
        value = one.tensors[name]
        if isinstance(value, Factors):
            product = sum(left.double().numpy() @ right.double().numpy() for left, right in value.terms)
            parts.append(np.ravel((value.decay - 1.0) * start + product))
        else:
            parts.append(np.ravel(value.double().numpy() - start))
    return np.concatenate(parts)


def moved(method: AggregationConfig, state: Tensors, replies: Sequence[Contribution]) -> np.ndarray:
    """What the code under test makes of the state, less the state."""
    means, _ = combine(method, state, iter(replies))
    after = applied(means, state)
    return np.concatenate([np.ravel(after[n].double().numpy() - t) for n, t in doubles(state).items()])


def expected(method: AggregationConfig, changes: np.ndarray, examples: Sequence[int]) -> np.ndarray:
    """Dense arithmetic in float64; ``changes`` (K, all coordinates), clients in the order of their names."""
    count = len(changes)
    if isinstance(method, KrumConfig | MultiKrumConfig):
        scores = []
        for i in range(count):
            distances = sorted(np.sum((changes[i] - changes[j]) ** 2) for j in range(count) if j != i)
            scores.append(sum(distances[: count - method.byzantine - 2]))
        best = sorted(range(count), key=lambda i: (scores[i], i))
        best = best[:1] if isinstance(method, KrumConfig) else best[: count - method.byzantine]
        return np.average(changes[best], axis=0, weights=np.array(examples)[best])  # type: ignore[no-any-return]
    if method.clip_norm is not None:
        norms = np.linalg.norm(changes, axis=1)
        bound = method.clip_norm * np.sort(norms)[(count - 1) // 2]
        changes = changes * np.minimum(1.0, bound / norms)[:, None]
    if isinstance(method, MeanConfig):
        return np.average(changes, axis=0, weights=examples if method.weights == "rows" else None)  # type: ignore[no-any-return]
    if isinstance(method, MedianConfig):
        return np.median(changes, axis=0)  # type: ignore[no-any-return]
    drop = int(method.trim * count + 1e-9)
    return np.sort(changes, axis=0)[drop : count - drop].mean(axis=0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["factors", "decayed", "dense"])
def test_uniform_mean_counts_every_client_alike(kind: str) -> None:
    state = base()
    replies = cohort([kind] * 5, state)
    check(MeanConfig(weights="uniform"), state, replies)


def check(method: AggregationConfig, state: Tensors, replies: Sequence[Contribution], *others: np.ndarray) -> None:
    """What is computed, and ``others``, are what float64 gives, but for float32's rounding of changes and weights."""
    changes = np.stack([flat_change(one, state) for one in replies])
    want = expected(method, changes, [one.num_examples for one in replies])
    weights = np.linalg.norm(np.concatenate([np.ravel(start) for start in doubles(state).values()]))
    allowed = 1e-6 * np.linalg.norm(changes, axis=1).max() + 2e-7 * weights
    for got in (moved(method, state, replies), *others):
        assert np.linalg.norm(got - want) <= allowed


@every_method
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(1, 3),
    kinds,
    st.integers(0, 10**6),
)
def test_every_method_is_dense_arithmetic_in_float64(
    method: AggregationConfig, shapes: list[Shape], rank: int, kinds: list[str], seed: int
) -> None:
    state = base([*shapes, (5,), ()], seed)
    check(method, state, cohort(kinds, state, seed, rank))


@every_method
@pytest.mark.parametrize("kind", ["factors", "decayed", "two bases", "common", "common, decayed"])
def test_factors_and_the_weights_they_make_combine_alike(method: AggregationConfig, kind: str) -> None:
    state = base()
    replies = cohort([kind] * 7, state)
    check(method, state, replies, moved(method, state, [melted(one, state) for one in replies]))


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_even_cohorts_have_the_mean_of_two_medians_and_the_lower_median_norm(count: int) -> None:
    state = base()
    for method in (MedianConfig(), MeanConfig(clip_norm=1.0), TrimmedMeanConfig(trim=0.49)):
        check(method, state, cohort(["factors"] * count, state))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e5])
@pytest.mark.parametrize("kind", ["factors", "decayed", "two bases", "dense"])
def test_inner_products_are_those_of_the_changes_however_large_the_weights_are(kind: str, size: float) -> None:
    state = base(size=size)
    replies = cohort([kind, kind, "dense"], state)
    changes = np.stack([flat_change(one, state) for one in replies])
    norms = np.linalg.norm(changes, axis=1)
    got = robust.gram([one.tensors for one in replies], state).numpy()
    assert (got == got.T).all()  # to the last bit, or two equal scores would not be equal
    assert (np.abs(got - changes @ changes.T) <= 1e-12 * np.outer(norms, norms)).all()


@pytest.mark.parametrize("name", IN_FACTORS)
def test_result_stays_in_factors_and_leaves_a_shared_basis_at_home(name: str) -> None:
    state = base(SHAPES[:2])
    rule = FedFTGRule(shared=(3, 2), aggregation=METHODS[name])
    updates = in_factors("common", state)
    outcome = aggregate(rule, 1, state, updates)
    assert outcome.step is not None
    assert set(outcome.step.tensors) == {f"{n}/{p}" for n, p in zip(state, ("left", "right"), strict=True)} | {
        f"{n}/decay" for n in state
    }
    assert all(torch.equal(t, outcome.state[n]) for n, t in outcome.step.apply(state, rule.exchange(1)).items())


@pytest.mark.parametrize("method", [MedianConfig(), TrimmedMeanConfig(trim=0.2)])
def test_coordinate_wise_result_travels_whole(method: AggregationConfig) -> None:
    state = base(SHAPES[:2])
    updates = in_factors("factors", state)
    step = aggregate(FedFTGRule(aggregation=method), 1, state, updates).step
    assert step is not None
    assert step.num_bytes == num_bytes(state.values())


@every_method
def test_order_of_arrival_changes_no_bit_and_arguments_are_not_touched(method: AggregationConfig) -> None:
    state = base()
    make = ["factors", "dense", "decayed", "dense", "two bases", "factors"]
    replies, untouched = cohort(make, state), cohort(make, state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    results = [combine(method, state, replies[turn:] + replies[:turn]) for turn in range(len(replies))]
    for means, told in results[1:]:
        assert told == results[0][1]
        assert all(torch.equal(t, applied(results[0][0], state)[n]) for n, t in applied(means, state).items())
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    for one, same in zip(replies, untouched, strict=True):
        assert (flat_change(one, state) == flat_change(same, state)).all()


@every_method
def test_rows_at_a_time_give_the_same(method: AggregationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = base()
    replies = cohort(["factors", "dense", "decayed", "dense", "two bases"], state)
    whole = moved(method, state, replies)
    monkeypatch.setattr(robust, "BLOCK", 5000)
    assert np.allclose(moved(method, state, replies), whole, rtol=0, atol=1e-6)


def lied(one: Contribution, factor: float, state: Tensors) -> Contribution:
    """The client's update with its change times ``factor``."""
    made = {}
    for name, value in one.tensors.items():
        if isinstance(value, Factors):
            made[name] = Factors(1 + factor * (value.decay - 1), [(factor * a, b) for a, b in value.terms])
        else:
            made[name] = state[name] + factor * (value - state[name])  # type: ignore[assignment]
    return one._replace(tensors=made, num_examples=10**6)


@pytest.mark.parametrize("factor", [1e6, -1e6])
@pytest.mark.parametrize("kind", ["decayed", "dense"])
@pytest.mark.parametrize("liar", [0, 3, 6])
class TestOneLiar:
    """One of seven clients sends its change times a million, and says that a million examples stand behind it."""

    @pytest.fixture
    def sent(self, kind: str, factor: float, liar: int) -> Sent:
        """State, updates, and the honest changes (6, all coordinates)."""
        state = base()
        replies = cohort([kind] * 7, state)
        honest = np.stack([flat_change(one, state) for k, one in enumerate(replies) if k != liar])
        replies[liar] = lied(replies[liar], factor, state)
        assert np.linalg.norm(moved(MeanConfig(), state, replies)) > 1e5 * np.linalg.norm(honest, axis=1).max()
        return state, replies, honest

    @pytest.mark.parametrize("method", [MedianConfig(), TrimmedMeanConfig(trim=0.15)])
    def test_coordinates_stay_between_those_of_honest_clients(self, sent: Sent, method: AggregationConfig) -> None:
        state, replies, honest = sent
        got = moved(method, state, replies)
        assert (got >= honest.min(0) - 1e-6).all()
        assert (got <= honest.max(0) + 1e-6).all()

    def test_clipped_it_counts_no_more_than_a_change_of_the_bound(self, sent: Sent, liar: int) -> None:
        state, replies, honest = sent
        norms = np.linalg.norm(honest, axis=1)
        _, told = combine(MeanConfig(clip_norm=1.0), state, replies)
        assert np.linalg.norm(moved(MeanConfig(clip_norm=1.0), state, replies)) <= norms.max() * (1 + 1e-5)
        assert told[f"clip-factor/site-{liar}"] < 1e-5
        assert told["clipped"] == sum(t < 1 for key, t in told.items() if key.startswith("clip-factor/")) == 3

    def test_krum_takes_an_honest_update_and_multi_krum_the_mean_of_all_honest_ones(
        self, sent: Sent, liar: int
    ) -> None:
        state, replies, honest = sent
        examples = [one.num_examples for k, one in enumerate(replies) if k != liar]
        krum, multi = (moved(m, state, replies) for m in (KrumConfig(byzantine=1), MultiKrumConfig(byzantine=1)))
        assert np.abs(honest - krum).max(1).min() < 1e-6
        assert np.abs(multi - np.average(honest, axis=0, weights=examples)).max() < 1e-6
        _, told = combine(MultiKrumConfig(byzantine=1), state, replies)
        assert told == {f"krum-selected/site-{k}": float(k != liar) for k in range(7)}


@every_method
def test_update_that_overflows_is_an_outlier_like_any_other(method: AggregationConfig) -> None:
    state = base(SHAPES[:2])
    replies = cohort(["factors"] * 7, state)
    huge = {
        n: Factors(1e300, [(torch.full_like(a, 1e38), -b) for a, b in v.terms]) for n, v in replies[2].tensors.items()
    }  # type: ignore[union-attr]
    replies[2] = replies[2]._replace(tensors=huge)
    got = moved(method, state, replies)
    assert np.abs(got).max() <= max(np.abs(flat_change(one, state)).max() for k, one in enumerate(replies) if k != 2)


@pytest.mark.parametrize(
    ("count", "byzantine", "says"),
    [
        (4, 1, "Krum with K = 4 updates and byzantine f = 1; allowed: K from 2 f + 3 = 5, or byzantine up to 0"),
        (8, 3, "Krum with K = 8 updates and byzantine f = 3; allowed: K from 2 f + 3 = 9, or byzantine up to 2"),
        (2, 0, "Krum with K = 2 updates and byzantine f = 0; allowed: K from 2 f + 3 = 3"),
    ],
)
def test_krum_needs_enough_updates(count: int, byzantine: int, says: str) -> None:
    state = base()
    for method in (KrumConfig(byzantine=byzantine), MultiKrumConfig(byzantine=byzantine)):
        with pytest.raises(AggregationError) as caught:
            combine(method, state, cohort(["dense"] * count, state))
        assert str(caught.value) == says
        enough = cohort(["dense"] * (2 * byzantine + 3), state)
        check(method, state, enough)


def test_equal_scores_go_by_name() -> None:
    """Two pairs of equal updates: all scores are zero."""
    state = base()
    one, other = cohort(["dense"] * 2, state)
    replies = [who._replace(client=name) for name, who in (("d", one), ("b", other), ("c", one), ("a", other))]
    _, told = combine(KrumConfig(byzantine=0), state, replies)
    assert [name for name, chosen in told.items() if chosen] == ["krum-selected/a"]


@pytest.mark.parametrize(
    ("count", "trim", "drop"), [(10, 0.1, 1), (9, 0.1, 0), (100, 0.29, 29), (3, 0.49, 1), (5, 0.2, 1)]
)
def test_trimmed_share_is_rounded_down_as_it_was_written(count: int, trim: float, drop: int) -> None:
    state = base([(2, 2)])
    _, told = combine(TrimmedMeanConfig(trim=trim), state, cohort(["dense"] * count, state))
    assert told == {"trimmed": float(drop)}


@every_method
def test_drift_is_that_of_all_updates_as_they_came(method: AggregationConfig) -> None:
    state = base(SHAPES[:2])
    updates = in_factors("factors", state)
    plain, found = (aggregate(FedFTGRule(aggregation=m), 1, state, updates).diagnostics for m in (None, method))
    assert plain.items() < found.items()


@every_method
def test_any_flower_app_and_the_federation_file_reach_every_method(method: AggregationConfig) -> None:
    for name in ("FedFTG", "FFALoRA", "RoLoRA", "FedIT", "FedSALoRA", "FLoRA"):
        alpha = {"lora_alpha": 16.0} if name == "FLoRA" else {}
        assert getattr(strategies, name)(aggregation=method, **alpha).rule.aggregation == method
    made = make_strategy(FedITConfig(), seed=0, aggregation=method).rule
    assert made.aggregation == method  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"flexlora: aggregation is .*; allowed: the plain mean"):
        make_rule(FlexLoRAConfig(), seed=0, aggregation=method)
