"""Updates of earlier versions: FedBuff's arithmetic (arXiv 2106.06639), in float64 and without the rules' own code."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.aggregation import MedianConfig
from common.model.adapters import LORA_A, LORA_B
from common.protocol.factors import Factors
from strategies.combine.stale import staleness
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.fedsa_lora import FedSALoRARule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.flora import FLoRARule
from strategies.rule import Rule, Tensors, Update
from tests.harness.rounds import (
    ALPHA,
    HEAD,
    LAYERS,
    aggregate,
    base_weights,
    close,
    doubles,
    lora,
    product,
    trained,
    truncated,
    weights,
)

ROWS, AGES = {"a": 30, "b": 10, "c": 60}, {"a": 0, "b": 1, "c": 3}
PARTS = {"a": 0.30 * 1.0, "b": 0.10 / 2**0.5, "c": 0.60 / 2.0}  # share of the rows times 1 / sqrt(1 + age)


def carried(rule: Rule, updates: Mapping[str, Update], starts: Mapping[str, Tensors], state: Tensors) -> list[Update]:
    found = []
    for name, update in updates.items():
        age = AGES[name]
        aged = replace(update, age=age)
        found.append(rule.carried_over(aged, starts[name], state, staleness(age)) if age else update)
    return found


def test_staleness_is_that_of_the_paper() -> None:
    assert [staleness(age) for age in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("kind", [FFALoRARule, FedITRule, FedSALoRARule, FedFTGRule])
def test_changes_are_added_to_the_current_state(kind: type[Rule], median: bool) -> None:
    """Under another aggregation, too: it sees the changes as they count."""
    aggregation = MedianConfig(method="median") if median else None
    rule = kind(aggregation=aggregation) if kind is FedFTGRule else kind(ALPHA, aggregation)  # type: ignore[call-arg]

    def some(seed: int) -> Tensors:
        tensors = weights(seed) if kind is FedFTGRule else lora(3, seed)
        return {n: t for n, t in tensors.items() if not (kind is FedSALoRARule and n.endswith(LORA_B))}

    state = some(0)
    starts = {name: state if name == "a" else some(seed) for seed, name in enumerate(ROWS, start=1)}
    updates = {
        name: Update(name, rows, trained(rule, 1, starts[name], seed)) for seed, (name, rows) in enumerate(ROWS.items())
    }
    after = aggregate(rule, 5, state, carried(rule, updates, starts, state)).state
    active = rule.active(1, state)
    assert {n: after[n].equal(state[n]) for n in state if n not in active} == {
        n: True for n in state if n not in active
    }
    for tensor in active:
        moved = {n: doubles(updates[n].tensors)[tensor] - doubles(starts[n])[tensor] for n in ROWS}
        mean = sum(PARTS[n] * moved[n] for n in ROWS)
        if median:
            mean = np.median([moved[n] * PARTS[n] * 100 / ROWS[n] for n in ROWS], axis=0)
        assert close(doubles(after)[tensor], doubles(state)[tensor] + mean), tensor


def test_a_change_in_factors_is_a_map_and_decays_the_current_weights() -> None:
    rule, state, g = FedFTGRule(), weights(0), torch.Generator().manual_seed(1)
    changes = {
        name: {
            weight: Factors(
                decay, [(torch.randn(len(tensor), 1, generator=g), torch.randn(1, tensor.shape[1], generator=g))]
            )
            for weight, tensor in state.items()
        }
        for name, decay in (("a", 1.0), ("b", 0.9), ("c", 0.5))
    }
    updates = {name: Update(name, ROWS[name], {}, factors=changes[name]) for name in ROWS}
    starts = {name: state if name == "a" else weights(7) for name in ROWS}
    outcome = aggregate(rule, 5, state, carried(rule, updates, starts, state))
    for weight, before in doubles(state).items():
        exact = before
        for name, part in PARTS.items():
            change = changes[name][weight]
            ((left, right),) = change.terms
            exact = exact + part * ((change.decay - 1) * before + left.double().numpy() @ right.double().numpy())
        assert close(doubles(outcome.state)[weight], exact)


def test_flora_adds_the_products_with_the_factors_that_each_site_was_given() -> None:
    rule = FLoRARule(ALPHA, max_rank=3)
    state = {**lora(3, 0), **base_weights(0)}
    state |= {name: torch.zeros_like(t) for name, t in state.items() if name.endswith(LORA_B)}
    starts = {name: {**state, **lora(3, seed)} for seed, name in enumerate(ROWS, start=1)}
    updates = {
        name: Update(name, rows, trained(rule, 1, starts[name], seed)) for seed, (name, rows) in enumerate(ROWS.items())
    }
    starts["a"] = state
    after = aggregate(rule, 5, state, carried(rule, updates, starts, state)).state
    for layer in LAYERS:
        added = sum(PARTS[n] * product(updates[n].tensors, layer, ALPHA / 3) for n in ROWS)
        weight = f"{layer}.base_layer.weight"
        assert close(doubles(after)[weight], doubles(state)[weight] + added)
        assert not after[layer + LORA_B].any()
    moved = sum(PARTS[n] * (doubles(updates[n].tensors)[HEAD] - doubles(starts[n])[HEAD]) for n in ROWS)
    assert close(doubles(after)[HEAD], doubles(state)[HEAD] + moved)


@pytest.mark.parametrize("rslora", [False, True])
def test_flexlora_adds_the_changes_of_the_products(rslora: bool) -> None:
    rule, ranks = FlexLoRARule(ALPHA, rslora=rslora, max_rank=4), {"a": 4, "b": 2, "c": 3}

    def scale(rank: int) -> float:
        return ALPHA / (rank**0.5 if rslora else rank)

    state = lora(4, 0)
    starts = {name: state if name == "a" else lora(4, seed) for seed, name in enumerate(ROWS, start=1)}
    updates = {name: Update(name, ROWS[name], lora(ranks[name], 10 + k), ALPHA) for k, name in enumerate(ROWS)}
    after = aggregate(rule, 5, state, carried(rule, updates, starts, state)).state
    for layer in LAYERS:
        exact = product(state, layer, scale(4))
        for name, part in PARTS.items():
            came = product(updates[name].tensors, layer, scale(ranks[name]))
            exact = exact + part * (came - product(starts[name], layer, scale(4)))
        assert after[layer + LORA_A].shape[0] == 4
        assert close(product(after, layer, scale(4)), truncated(exact, 4), 1e-5)
    stale = {name: update for name, update in updates.items() if name != "a"}  # nobody has the current version
    assert aggregate(rule, 5, state, carried(rule, stale, starts, state)).state[layer + LORA_A].shape[0] == 4
