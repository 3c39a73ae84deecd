"""What holds for every rule, whatever it computes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from common.config.aggregation import (
    AggregationConfig,
    KrumConfig,
    MeanConfig,
    MedianConfig,
    MultiKrumConfig,
    TrimmedMeanConfig,
)
from common.errors import AggregationError
from common.model.adapters import BASE_WEIGHT, FACTORS
from strategies import STRATEGIES
from strategies.rule import Rule, Setup, Tensors, Update
from tests.harness.rounds import (
    ALPHA,
    LAYERS,
    aggregate,
    base_weights,
    close,
    doubles,
    effective,
    lora,
    product,
    trained,
    weights,
)


def rule_of(name: str, aggregation: AggregationConfig | None = None, **options: Any) -> Rule:
    section = STRATEGIES[name].section
    alpha = {"lora_alpha": ALPHA} if section.trains == "lora" else {}
    return STRATEGIES[name].from_section(section(**alpha, **options), Setup(aggregation=aggregation))


RULES: dict[str, Callable[[], Rule]] = {name: partial(rule_of, name) for name in STRATEGIES}
ROBUST: dict[str, AggregationConfig] = {
    "clipped": MeanConfig(clip_norm=1.0),
    "trimmed mean": TrimmedMeanConfig(trim=0.34),
    "median": MedianConfig(clip_norm=2.0),
    "krum": KrumConfig(byzantine=0),
    "multi-krum": MultiKrumConfig(byzantine=0),
}
ROBUST_RULES: dict[str, Callable[[], Rule]] = {
    f"{name}, {method}": partial(rule_of, name, aggregation)
    for name, made in STRATEGIES.items()
    for method, aggregation in ROBUST.items()
    if made.section.plain_mean_only is None
}


def each(rules: dict[str, Callable[[], Rule]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rule", [make() for make in rules.values()], ids=list(rules))


every_mean = each(RULES)  # laws of means
every_rule = each(RULES | ROBUST_RULES)
either_phase = pytest.mark.parametrize("server_round", [1, 2])


def start(rule: Rule, dtype: torch.dtype = torch.float32) -> Tensors:
    if rule.section.trains == "weights":
        return weights(0, dtype)
    state = lora(4, 0, dtype=dtype) | (base_weights(1, dtype) if rule.section.changes_base else {})
    local = rule.section.stays_at_site
    return {name: tensor for name, tensor in state.items() if local is None or not name.endswith(FACTORS[local])}


def some_updates(rule: Rule, server_round: int, state: Tensors) -> list[Update]:
    return [Update(f"c{k}", n, trained(rule, server_round, state, 10 + k), None) for k, n in enumerate((3, 1, 7))]


def same(rule: Rule, a: Tensors, b: Tensors, tolerance: float = 2e-6) -> bool:
    """Equal states; of factors that may turn, or start anew, equal products; with base weights, equal sums of both."""
    assert a.keys() == b.keys()
    x, y = doubles(a), doubles(b)
    turn = (".lora_", BASE_WEIGHT) if rule.section.mixed_ranks or rule.section.splits_anew else (BASE_WEIGHT,)
    names = [name for name in a if not any(part in name for part in turn)]
    whole = partial(effective, scaling=ALPHA / 4) if rule.section.changes_base else product
    return all(close(x[n], y[n], tolerance) for n in names) and all(
        close(whole(a, layer), whole(b, layer), tolerance) for layer in (LAYERS if len(names) < len(a) else ())
    )


@every_rule
@either_phase
def test_order_of_clients_changes_nothing(rule: Rule, server_round: int) -> None:
    state = start(rule)
    updates = some_updates(rule, server_round, state)
    forwards, backwards = (aggregate(rule, server_round, state, u).state for u in (updates, updates[::-1]))
    assert same(rule, forwards, backwards)


@every_rule
@either_phase
def test_no_change_is_a_fixed_point(rule: Rule, server_round: int) -> None:
    state = start(rule)
    active = rule.active(server_round, state)
    updates = [Update(f"c{k}", n, {name: state[name].clone() for name in active}) for k, n in enumerate((5, 2, 1))]
    assert same(rule, aggregate(rule, server_round, state, updates).state, state)


@each(RULES | {name: make for name, make in ROBUST_RULES.items() if "krum" not in name})  # it needs three
@either_phase
def test_one_client_is_taken_as_it_is(rule: Rule, server_round: int) -> None:
    state = start(rule)
    update = some_updates(rule, server_round, state)[0]
    assert same(rule, aggregate(rule, server_round, state, [update]).state, {**state, **update.tensors})


@every_mean
@either_phase
def test_a_client_in_two_halves_is_the_same_client(rule: Rule, server_round: int) -> None:
    state = start(rule)
    a, b, c = some_updates(rule, server_round, state)
    halves = [Update("h1", 3, c.tensors), Update("h2", 4, c.tensors)]
    whole, split = (aggregate(rule, server_round, state, u).state for u in ([a, b, c], [a, b, *halves]))
    assert same(rule, whole, split)


@every_rule
@either_phase
def test_arguments_are_not_touched(rule: Rule, server_round: int) -> None:
    state = start(rule)
    updates = some_updates(rule, server_round, state)
    before = [{n: t.clone() for n, t in tensors.items()} for tensors in (state, *(u.tensors for u in updates))]
    aggregate(rule, server_round, state, updates)
    for kept, now in zip(before, (state, *(u.tensors for u in updates)), strict=True):
        assert all(torch.equal(kept[name], now[name]) for name in kept)


@every_rule
@either_phase
def test_frozen_tensors_are_carried_over_bit_for_bit(rule: Rule, server_round: int) -> None:
    state = start(rule)
    after = aggregate(rule, server_round, state, some_updates(rule, server_round, state)).state
    turned = (BASE_WEIGHT, *FACTORS.values()) if rule.section.splits_anew else (BASE_WEIGHT,)
    frozen = {name for name in state if not name.endswith(turned)} - set(rule.active(server_round, state))
    assert all(torch.equal(after[name], state[name]) for name in frozen)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_has_the_type_of_the_state(rule: Rule, dtype: torch.dtype) -> None:
    state = start(rule, dtype)
    exact = aggregate(rule, 1, {n: t.float() for n, t in state.items()}, [
        Update(u.client, u.num_examples, {n: t.float() for n, t in u.tensors.items()})
        for u in some_updates(rule, 1, state)
    ]).state  # fmt: skip
    after = aggregate(rule, 1, state, some_updates(rule, 1, state)).state
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert same(rule, after, exact, tolerance=2e-2)


@every_rule
def test_a_round_without_updates_is_an_error(rule: Rule) -> None:
    with pytest.raises(AggregationError, match="no update to average: every client failed or was refused"):
        aggregate(rule, 1, start(rule), [])


@every_rule
def test_diagnostics_are_finite_numbers_per_layer_group(rule: Rule) -> None:
    state = start(rule)
    found = aggregate(rule, 1, state, some_updates(rule, 1, state)).diagnostics
    of_method = ("clip-factor", "clipped", "krum-selected", "trimmed")
    groups = {name.partition("/")[2] for name in found if not name.startswith(of_method)}
    assert {"model.layers.0", "model.layers.1"} <= groups <= {"model.layers.0", "model.layers.1", "classifier"}
    assert all(isinstance(v, float) and abs(v) < 1e6 for v in found.values())
    assert {"client-norm", "client-cosine"} <= {name.partition("/")[0] for name in found}
