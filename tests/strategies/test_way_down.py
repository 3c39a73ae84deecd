"""A way down of bounded rank: nothing is lost, what waits is known exactly, and all sites hold what is published."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from client.held_weights import Weights
from common.config.aggregation import FedAvgMConfig, KrumConfig, MeanConfig, MedianConfig
from common.protocol.factors import Factors, Precision, num_bytes
from strategies.fedftg import FedFTGRule
from strategies.flower.messages import RuleMessages
from strategies.flower.strategy import FlowerStrategy
from strategies.rule import Tensors, Update
from strategies.way_down import WayDown
from tests.harness.rounds import Arrays, aggregate, close, doubles

UP, DOWN, HEAD = "model.layers.0.up.weight", "model.layers.0.down.weight", "classifier.weight"
Rank = int | Literal["auto"]


def base(rows: int = 48, columns: int = 32, seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    shapes = {UP: (rows, columns), DOWN: (columns, rows), HEAD: (3, 20)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def update(state: Tensors, number: int, client: int, rank: int, *, decay: float = 0.0, dense: bool = False) -> Update:
    """A client's update: factors for the weights, or all of it dense; the head is dense."""
    g = torch.Generator().manual_seed(1000 * number + client)
    head = state[HEAD] + 0.1 * torch.randn(state[HEAD].shape, generator=g)
    factors = {}
    for name in (UP, DOWN):
        (m, n), size = state[name].shape, min(rank, *state[name].shape)
        pair = (0.1 * torch.randn(m, size, generator=g), torch.randn(size, n, generator=g))
        factors[name] = Factors(1.0 - decay * client, [pair])
    if dense:
        whole = {name: change.apply(state[name]) for name, change in factors.items()}
        return Update(f"c{client}", 1 + client, {HEAD: head, **whole})
    return Update(f"c{client}", 1 + client, {HEAD: head}, None, factors)


def change(state: Tensors, one: Update) -> Arrays:
    """An update's change in float64."""
    start = doubles(state)
    exact = {name: tensor.double().numpy() - start[name] for name, tensor in one.tensors.items()}
    for name, factors in one.factors.items():
        ((left, right),) = factors.terms
        exact[name] = (factors.decay - 1) * start[name] + left.double().numpy() @ right.double().numpy()
    return exact


def server(state: Tensors, rank: Rank, precision: Precision = "float32", **more: object) -> RuleMessages:
    optimizer = more.pop("server_optimizer", None)
    rule = FedFTGRule(precision, whole=optimizer is not None, downlink_rank=rank, **more)  # type: ignore[arg-type]
    strategy = FlowerStrategy(rule, server_optimizer=optimizer)  # type: ignore[arg-type]
    strategy.begin(state)
    return strategy


def waits(strategy: RuleMessages, name: str) -> np.ndarray | float:
    """E of a weight, in float64."""
    assert strategy.way_down is not None
    held = doubles(strategy.way_down.waiting)
    if name in held:
        return held[name]
    return held[f"{name}/left"] @ held[f"{name}/right"] if f"{name}/left" in held else 0.0  # type: ignore[no-any-return]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(4, 60), st.integers(4, 60)),
    st.integers(1, 8),  # sites
    st.integers(1, 6),  # rank of an update
    st.one_of(st.integers(1, 12), st.just("auto")),
    st.sampled_from([0.0, 1e-2]),
    st.sampled_from([False, True]),
)
def test_published_and_waiting_are_the_exact_state(
    shape: tuple[int, int], sites: int, rank: int, limit: Rank, decay: float, dense: bool
) -> None:
    state = base(*shape)
    strategy, exact = server(state, limit), doubles(state)
    site = Weights(state, strategy.rule.exchange)
    for number in range(1, 5):
        updates = [
            update(state, number, k, rank, decay=decay, dense=dense and (k + number) % 2 == 0) for k in range(sites)
        ]
        total = sum(one.num_examples for one in updates)
        for one in updates:
            exact = {name: exact[name] + one.num_examples / total * c for name, c in change(state, one).items()}
        before = state
        outcome = strategy.combine(number, state, iter(updates))
        state = outcome.state
        for name in (UP, DOWN, HEAD):
            assert close(doubles(state)[name] + waits(strategy, name), exact[name], 3e-6)
        step = outcome.step
        assert step is not None
        assert strategy.versions is not None
        site.follow([step], site.version, strategy.versions.latest)
        assert all(torch.equal(site.tensors[name], tensor) for name, tensor in state.items())
        if limit != "auto" and limit * sum(shape) < shape[0] * shape[1]:
            assert {UP, DOWN}.isdisjoint(step.tensors)
            assert all(len(step.tensors[f"{name}/right"]) <= limit for name in (UP, DOWN))
        assert num_bytes(strategy.way_down.waiting.values()) <= num_bytes(state.values())  # type: ignore[union-attr]
    settled = strategy.settle(before, state)
    assert strategy.way_down is not None
    assert strategy.way_down.waiting == {}
    assert all(close(doubles(settled)[name], exact[name], 3e-6) for name in (UP, DOWN, HEAD))
    assert strategy.versions is not None
    late, steps = Weights(base(*shape), strategy.rule.exchange), strategy.versions.since(strategy.versions.first)
    if steps is not None:  # a site that was away since the start; a step that was made anew is there once
        late.follow(steps, late.version, strategy.versions.latest)
        assert all(torch.equal(late.tensors[name], tensor) for name, tensor in settled.items())


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("method", [MeanConfig(), MeanConfig(clip_norm=1.0), KrumConfig(byzantine=0)])
def test_enough_directions_give_the_same_bits_as_no_limit(precision: Precision, method: object) -> None:
    state, free, limited = base(), [], []
    strategy = server(state, 12, precision, aggregation=method)
    rule = FedFTGRule(precision, aggregation=method)  # type: ignore[arg-type]
    one = other = state
    for number in (1, 2):
        updates = [update(one, number, k, 3) for k in range(3)]
        free.append(aggregate(rule, number, one, updates))
        limited.append(strategy.combine(number, other, iter(updates)))
        one, other = free[-1].state, limited[-1].state
    for a, b in zip(free, limited, strict=True):
        assert a.step is not None
        assert b.step is not None
        assert a.step.tensors.keys() == b.step.tensors.keys()
        assert all(torch.equal(tensor, b.step.tensors[name]) for name, tensor in a.step.tensors.items())
        assert all(torch.equal(tensor, b.state[name]) for name, tensor in a.state.items())


def test_median_that_comes_dense_is_published_in_factors_too() -> None:
    state, exact = base(), doubles(base())
    strategy = server(state, 4, aggregation=MedianConfig())
    for number in range(1, 4):
        updates = [update(state, number, k, 3) for k in range(5)]
        for name in exact:
            exact[name] = exact[name] + np.median([change(state, one)[name] for one in updates], axis=0)
        outcome = strategy.combine(number, state, iter(updates))
        state = outcome.state
        assert outcome.step is not None
        assert all(len(outcome.step.tensors[f"{name}/right"]) == 4 for name in (UP, DOWN))
        assert all(close(doubles(state)[name] + waits(strategy, name), exact[name]) for name in (UP, DOWN))


def test_what_waits_arrives_when_nothing_new_comes() -> None:
    state = base()
    strategy = server(state, 4)
    updates = [update(state, 1, k, 3) for k in range(4)]  # 12 directions
    state = strategy.combine(1, state, iter(updates)).state
    exact = {name: doubles(state)[name] + waits(strategy, name) for name in (UP, DOWN)}
    for number in (2, 3):
        still = update(state, number, 0, 1)
        still.tensors[HEAD] = state[HEAD]
        for factors in still.factors.values():
            factors.terms[0][0].zero_()
        assert not close(doubles(state)[UP], exact[UP], 1e-3)
        state = strategy.combine(number, state, iter([still])).state
    assert all(close(doubles(state)[name], exact[name], 1e-5) for name in (UP, DOWN))


def test_same_updates_again_and_again_are_followed_at_a_bounded_distance() -> None:
    """Error feedback: the distance does not grow with the rounds, so T / t goes to the exact direction."""
    state, strategy = base(), server(base(), 4)
    far = []
    for number in range(1, 41):
        updates = [update(state, 1, k, 3) for k in range(8)]  # 24 directions of 32
        outcome = strategy.combine(number, state, iter(updates))
        state = outcome.state
        far.append(outcome.diagnostics["waiting/model.layers.0"])
    assert far[0] > 0.5
    assert max(far[20:]) <= 1.1 * max(far[10:20])
    assert max(far) < 8.0


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_what_rounding_on_the_wire_loses_waits_too(precision: Precision) -> None:
    state, exact = base(), doubles(base())
    strategy = server(state, 4, precision)
    for number in range(1, 4):
        updates = [update(state, number, k, 3) for k in range(4)]
        for one in updates:
            exact = {name: exact[name] + one.num_examples / 10 * c for name, c in change(state, one).items()}
        outcome = strategy.combine(number, state, iter(updates))
        state = outcome.state
        assert 1e-4 < outcome.diagnostics["wire-error/mean"] < 0.02
        assert all(close(doubles(state)[name] + waits(strategy, name), exact[name]) for name in (UP, DOWN))


def test_server_optimizer_steps_the_exact_state() -> None:
    optimizer = FedAvgMConfig(momentum=0.5, learning_rate=0.7)
    state, exact = base(), doubles(base())
    strategy = server(state, 4, server_optimizer=optimizer)
    moment: Arrays = {name: np.zeros_like(array) for name, array in exact.items()}
    for number in range(1, 5):
        updates = [update(state, number, k, 3) for k in range(4)]
        for name in exact:
            mean = sum(one.num_examples / 10 * change(state, one)[name] for one in updates)
            moment[name] = 0.5 * moment[name] + mean
            exact[name] = exact[name] + 0.7 * moment[name]
        outcome = strategy.combine(number, state, iter(updates))
        state = outcome.state
        assert all(close(doubles(state)[name] + waits(strategy, name), exact[name]) for name in exact)
        assert outcome.step is not None
        assert all(len(outcome.step.tensors[f"{name}/right"]) == 4 for name in (UP, DOWN))


def test_weight_decay_is_published_at_once_and_takes_no_direction() -> None:
    """Also where the mean came dense: decay alone leaves nothing to wait."""
    state = base()
    for dense in (False, True):
        strategy = server(state, 2)
        updates = [update(state, 1, k, 1, decay=1e-2, dense=dense) for k in (1, 2)]
        for one in updates:
            for factors in one.factors.values():
                factors.terms[0][0].zero_()
            if dense:
                one.tensors.update({name: (1 - 1e-2 * (one.num_examples - 1)) * state[name] for name in (UP, DOWN)})
        outcome = strategy.combine(1, state, iter(updates))
        decay = (2 * (1 - 1e-2) + 3 * (1 - 2e-2)) / 5
        for name in (UP, DOWN):
            assert close(doubles(outcome.state)[name], decay * doubles(state)[name], 1e-6)
            assert np.linalg.norm(waits(strategy, name)) <= 1e-6 * np.linalg.norm(doubles(state)[name])


def test_way_down_goes_on_bit_for_bit_from_what_a_checkpoint_holds() -> None:
    rule, state = FedFTGRule(), base()
    ways = [WayDown(3)]
    for number in range(1, 6):
        updates = [update(state, number, k, 3) for k in range(6)]
        found = []
        for way in (*ways, WayDown(3, {name: tensor.clone() for name, tensor in ways[0].waiting.items()})):
            found.append(way.aggregate(rule, None, number, state, iter(updates)))
        one, other = found
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())
        assert one.diagnostics == other.diagnostics
        state = one.state
    assert {UP, DOWN} <= ways[0].waiting.keys()  # dense by now
