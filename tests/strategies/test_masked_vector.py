"""The mean of a masked sum is the mean of the updates themselves, for every strategy that a sum is enough for."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import PolicyError, RefusedUpdate, WireError
from common.masking.fixed_point import Words
from common.protocol.factors import Factors, pack
from common.protocol.tensors import Tensors
from strategies.admission.bounds import change_norms, check_possible
from strategies.combine.masked import Vector, agreed_text, weight_of
from strategies.flower.named import make_rule
from strategies.rule import Rule, Update
from tests.harness.rounds import HEAD, aggregate, doubles, lora, normal, weights

LR = 0.05


def federation(strategy: Any, **training: Any) -> FederationConfig:
    data = {"name": "x", "model": {"path": "m"}, "strategy": strategy, "rounds": 3, "cohort": {"min_clients": 2}}
    data |= {"training": {"learning_rate": LR, "local_steps": 4, **training}, "secure_aggregation": {"threshold": 2}}
    return parse(data, FederationConfig, "f")


def update_of(config: FederationConfig, rule: Rule, number: int, state: Tensors, seed: int) -> Tensors:
    """An update as a site packs it: dense tensors that moved a little, or factors in the round's basis."""
    g = torch.Generator().manual_seed(seed)
    exchange, sent = rule.exchange(number), {}
    for name in rule.active(number, state):
        start = state[name]
        if exchange.basis is None or name == HEAD:
            sent[name] = start + 0.1 * LR * normal(g, *start.shape).clamp(-3, 3).to(start.dtype)
            continue
        basis, right = exchange.basis(name, start.shape), start.shape[0] >= start.shape[1]
        low = 0.02 * LR * normal(g, *((len(start), len(basis)) if right else (basis.shape[1], start.shape[1])))
        decay = (1 - LR * config.training.weight_decay) ** 4
        sent |= pack(name, Factors(decay, [(low, basis) if right else (basis, low)], common=True), start, exchange)
    return sent


def unpacked(rule: Rule, number: int, state: Tensors, sent: Tensors, rows: int) -> Update:
    from common.protocol.factors import unpack

    factored = rule.section.trains == "weights"
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if factored}
    dense, factors = unpack(sent, shapes, rule.exchange(number))
    return Update("a site", rows, dense, rule.lora_alpha, factors)


CASES: list[tuple[Any, dict[str, Any]]] = [
    ({"name": "fedftg", "subspace": "shared", "rank": 2}, {}),
    ({"name": "fedftg", "subspace": "shared", "rank": 2}, {"weight_decay": 0.1}),
    ({"name": "fedftg", "subspace": "shared", "rank": 5}, {"optimizer": "sgd"}),  # the factors are not smaller
    ("ffa-lora", {}),
    ("rolora", {}),
    ("fedit", {"weight_decay": 0.1}),
    ("fedit", {"optimizer": "sgd"}),
    ("fedsa-lora", {}),
]


@pytest.mark.parametrize(("strategy", "training"), CASES)
@settings(max_examples=6, deadline=None)
@given(rows=st.lists(st.integers(1, 500), min_size=1, max_size=5), number=st.integers(1, 3), seed=st.integers(0, 999))
def test_mean_of_the_sum_is_the_rules_own(
    strategy: Any, training: Any, rows: list[int], number: int, seed: int
) -> None:
    config = federation(strategy, **training)
    rule = make_rule(config.strategy, seed=0)
    state = {**weights(seed), HEAD: lora(1, seed)[HEAD]} if rule.section.trains == "weights" else lora(2, seed)
    if rule.section.stays_at_site == "B":
        state = {name: tensor for name, tensor in state.items() if "lora_B" not in name}
    vector = Vector(config, state, rule.active(number, state), rule.exchange(number), max(rows))
    sent = [update_of(config, rule, number, state, seed + k) for k in range(len(rows))]
    total: Words = np.zeros(vector.words, np.uint32)
    for tensors, count in zip(sent, rows, strict=True):
        words, clipped = vector.encode(tensors, weight_of(count, max(rows)), 7)
        assert clipped == 0
        total += vector.join(vector.split(words))
    found, factors = vector.mean(total, sum(weight_of(count, max(rows)) for count in rows), 7)
    mean = Update("the mean", max(rows), found, rule.lora_alpha, factors)
    got = aggregate(rule, number, state, [mean]).state
    want = aggregate(
        rule, number, state, [unpacked(rule, number, state, s, n) for s, n in zip(sent, rows, strict=True)]
    ).state
    start = doubles(state)
    for name in rule.active(number, state):
        ours, theirs = got[name].numpy(), doubles(want)[name]
        rounding = np.spacing(np.abs(ours)).astype(np.float64)  # both states are float32: half a unit each
        assert np.all(np.abs(ours - theirs) <= rounding + 1e-5 * np.abs(theirs - start[name]).max()), name
    check_possible(mean, change_norms(mean, state), state, config.training, config.strategy)


def test_numbers_beyond_the_bound_are_clipped_and_counted() -> None:
    config = federation("fedit")
    rule, state = make_rule(config.strategy, seed=0), lora(2, 0)
    vector = Vector(config, state, rule.active(1, state), rule.exchange(1), 10)
    sent = update_of(config, rule, 1, state, 0)
    sent[HEAD] = sent[HEAD].clone()
    sent[HEAD][0, :2] = torch.tensor([1e6, float("nan")])
    words, clipped = vector.encode(sent, 1.0, 1)
    assert clipped == 2
    moved = vector.mean(words, 1.0, 1)[0][HEAD] - state[HEAD]
    assert 0 < float(moved[0, 0]) < 1
    assert float(moved[0, 1]) == 0


def test_mean_that_training_cannot_have_made_is_refused() -> None:
    """All that a poisoner can add to the sum is bounded by what the mean may be: an honest update's most."""
    config = federation("fedit")
    rule, state = make_rule(config.strategy, seed=0), lora(2, 0)
    vector = Vector(config, state, rule.active(1, state), rule.exchange(1), 10)
    poisoned = np.full(vector.words, 2**30, np.uint32)
    found, _ = vector.mean(poisoned, 1.0, 3)
    mean = Update("the mean", 10, found, rule.lora_alpha)
    with pytest.raises(RefusedUpdate, match=r"the mean: .* moved by .*; allowed: "):
        check_possible(mean, change_norms(mean, state), state, config.training, config.strategy)


@pytest.mark.parametrize("wrong", ["missing", "more", "shape", "dtype"])
def test_masked_numbers_of_another_form_are_refused(wrong: str) -> None:
    config = federation("fedit")
    rule, state = make_rule(config.strategy, seed=0), lora(2, 0)
    vector = Vector(config, state, rule.active(1, state), rule.exchange(1), 10)
    sent = vector.split(np.zeros(vector.words, np.uint32))
    if wrong == "missing":
        del sent[HEAD]
    else:
        sent |= {"more": {"x": sent[HEAD]}, "shape": {HEAD: sent[HEAD].T}, "dtype": {HEAD: sent[HEAD].float()}}[wrong]
    with pytest.raises(WireError, match=r"is missing|was not to come|allowed: int32 \(3, 5\)"):
        vector.join(sent)


@pytest.mark.parametrize("clip", [None, 5.0])
def test_noise_that_all_share_is_in_the_mean_but_not_in_the_decay(clip: float | None) -> None:
    data = federation({"name": "fedftg", "subspace": "shared", "rank": 2}, weight_decay=0.1).model_dump(mode="json")
    config = parse({**data, "secure_aggregation": {"threshold": 2, "noise": 0.01}}, FederationConfig, "f")
    rule, state = make_rule(config.strategy, seed=0), weights(0)
    vector = Vector(config, state, list(state), rule.exchange(1), 10)
    vector.check(3, clip)
    sent, shares = update_of(config, rule, 1, state, 0), (1.0, 0.5, 0.5)
    still = {n: t if n.endswith("/decay") else torch.zeros_like(t) for n, t in sent.items()}
    total = np.sum([vector.encode(still, w, 3, clip)[0] for w in shares], axis=0, dtype=np.uint32)
    _, factors = vector.mean(total, sum(shares), 3)
    decay = (1 - LR * 0.1) ** 4
    assert all(abs(one.decay - decay) < 1e-6 for one in factors.values())
    noise = torch.cat([term.flatten() for one in factors.values() for term in one.terms[0]])
    own = torch.cat([n.flatten() for name in state for n in [projected(factors[name], state[name])]])
    assert float(own.std()) == pytest.approx(0.01 * 3**0.5 / sum(shares), rel=0.3)
    assert len(own) < len(noise)


def projected(factors: Factors, start: torch.Tensor) -> torch.Tensor:
    """The part of a change that is not the basis."""
    left, right = factors.terms[0]
    return left if start.shape[0] >= start.shape[1] else right


def test_grid_too_coarse_for_the_noise_is_refused_before_training() -> None:
    data = federation("fedit").model_dump(mode="json")
    config = parse({**data, "secure_aggregation": {"threshold": 2, "noise": 1e-9}}, FederationConfig, "f")
    rule, state = make_rule(config.strategy, seed=0), lora(2, 0)
    vector = Vector(config, state, rule.active(1, state), rule.exchange(1), 10)
    with pytest.raises(PolicyError, match=r"`secure_aggregation.noise` is 1e-09, \d+ steps"):
        vector.check(3, None)
    with pytest.raises(PolicyError, match="`clip` is 1e-12, but rounding"):
        Vector(federation("fedit"), state, rule.active(1, state), rule.exchange(1), 10).check(3, 1e-12)


def test_everything_that_encoding_follows_from_is_bound_to_the_masks() -> None:
    """Else a server could have some sites round to another grid, or by other settings, than the site it looks at."""
    base: list[Any] = ["settings", "version", ["a", "b"], 10, 5]
    others = ["other", "x", ["a"], 11, 6]
    told = [agreed_text(*base), *(agreed_text(*base[:k], other, *base[k + 1 :]) for k, other in enumerate(others))]
    assert len(set(told)) == 6
