"""FedFTG, FFA-LoRA, RoLoRA and FedIT against weighted means in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from common.config.aggregation import MedianConfig
from common.errors import AggregationError
from common.protocol.factors import Factors
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.lora_names import LORA_A, LORA_B
from strategies.rolora import RoLoRARule
from strategies.rule import Rule, Tensors, Update
from tests.harness.rounds import (
    ALPHA,
    HEAD,
    LAYERS,
    aggregate,
    close,
    doubles,
    lora,
    product,
    trained,
    weighted_mean,
    weights,
)

examples = st.lists(st.integers(1, 10**6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(examples, st.sampled_from([1e-6, 1e-2, 10.0]), st.integers(0, 10**6))
def test_fedftg_is_the_weighted_mean(examples: list[int], size: float, seed: int) -> None:
    rule, state = FedFTGRule(), weights(seed)
    replies = [trained(rule, 1, state, seed + 1 + k, size) for k in range(len(examples))]
    updates = [Update(f"c{k}", n, r) for k, (n, r) in enumerate(zip(examples, replies, strict=True))]
    after = doubles(aggregate(rule, 1, state, updates).state)
    for name in state:
        assert close(after[name], weighted_mean([doubles(r)[name] for r in replies], examples))


def test_equal_weights_average_to_themselves_bit_for_bit() -> None:
    rule, state = FedFTGRule(), weights(0, torch.bfloat16)
    updates = [Update(f"c{k}", n, {n_: t.clone() for n_, t in state.items()}) for k, n in enumerate((3, 1, 10**6))]
    after = aggregate(rule, 1, state, updates).state
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_sum_of_bfloat16_weights_is_kept_in_float32() -> None:
    """300 clients at 1 and 1.0078125 (one step of bfloat16): a bfloat16 sum would stop growing at 256."""
    state = {"w.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    high = {"w.weight": torch.full((2, 2), 1.0078125, dtype=torch.bfloat16)}
    updates = [Update(f"c{k}", 1, high) for k in range(300)]
    assert torch.equal(aggregate(FedFTGRule(), 1, state, updates).state["w.weight"], high["w.weight"])


def play(rule: Rule, state: Tensors, rounds: int, seed: int) -> list[tuple[Tensors, list[Tensors]]]:
    """Rounds with clients of 3, 1 and 7 examples: the state after each, and what the clients had sent."""
    history = []
    for server_round in range(1, rounds + 1):
        replies = [trained(rule, server_round, state, seed + 10 * server_round + k) for k in range(3)]
        updates = [Update(f"c{k}", n, r, ALPHA) for k, (n, r) in enumerate(zip((3, 1, 7), replies, strict=True))]
        state = aggregate(rule, server_round, state, updates).state
        history.append((state, replies))
    return history


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_ffa_is_exact_over_three_rounds_and_never_moves_a(rank: int, seed: int) -> None:
    before = lora(rank, seed)
    for after, replies in play(FFALoRARule(ALPHA), before, 3, seed):
        assert not [name for reply in replies for name in reply if name.endswith(LORA_A)]
        assert all(torch.equal(after[name], before[name]) for name in before if name.endswith(LORA_A))
        for layer in LAYERS:
            exact = weighted_mean([product({**before, **reply}, layer) for reply in replies], (3, 1, 7))
            assert close(product(after, layer), exact)
        assert close(doubles(after)[HEAD], weighted_mean([doubles(r)[HEAD] for r in replies], (3, 1, 7)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_rolora_is_exact_in_each_phase_over_four_rounds(rank: int, seed: int) -> None:
    before = lora(rank, seed)
    for number, (after, replies) in enumerate(play(RoLoRARule(ALPHA), before, 4, seed), start=1):
        resting = LORA_A if number in (1, 3) else LORA_B
        assert all(torch.equal(after[name], before[name]) for name in before if name.endswith(resting))
        for layer in LAYERS:
            exact = weighted_mean([product({**before, **reply}, layer) for reply in replies], (3, 1, 7))
            assert close(product(after, layer), exact)
        before = after


def test_rolora_phase_follows_from_the_global_round_alone() -> None:
    names = list(lora(2, 0))
    rule, fresh = RoLoRARule(ALPHA), RoLoRARule(ALPHA)
    for _ in range(3):  # asking again, as an evaluation or a repeated message does, moves nothing
        assert [n for n in rule.active(7, names) if n.endswith(LORA_A)] == []
    assert rule.active(8, names) == fresh.active(8, names)
    assert [n for n in rule.active(8, names) if n.endswith(LORA_B)] == []
    assert HEAD in rule.active(7, names)
    assert HEAD in rule.active(8, names)


def test_rolora_phase_carries_at_most_half_of_loras_numbers_for_square_layers() -> None:
    state = {"q.lora_A.weight": torch.zeros(4, 32), "q.lora_B.weight": torch.zeros(32, 4)}
    whole = sum(t.numel() for t in state.values())
    for server_round in (1, 2):
        assert 2 * sum(state[n].numel() for n in RoLoRARule().active(server_round, state)) <= whole


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_fedit_averages_each_factor_and_reports_what_that_loses(rank: int, seed: int) -> None:
    rule, state = FedITRule(ALPHA), lora(rank, seed)
    replies = [trained(rule, 1, state, seed + k) for k in range(3)]
    updates = [Update(f"c{k}", n, r, ALPHA) for k, (n, r) in enumerate(zip((3, 1, 7), replies, strict=True))]
    outcome = aggregate(rule, 1, state, updates)
    for name in state:
        assert close(doubles(outcome.state)[name], weighted_mean([doubles(r)[name] for r in replies], (3, 1, 7)))
    for group in ("model.layers.0", "model.layers.1"):
        exact = [weighted_mean([product(r, x) for r in replies], (3, 1, 7)) for x in LAYERS if x.startswith(group)]
        got = [product(outcome.state, x) for x in LAYERS if x.startswith(group)]
        lost = np.sqrt(sum(np.linalg.norm(a - b) ** 2 for a, b in zip(exact, got, strict=True)))
        relative = lost / np.sqrt(sum(np.linalg.norm(a) ** 2 for a in exact))
        assert outcome.diagnostics[f"aggregation-error/{group}"] == pytest.approx(relative, rel=1e-4)


def test_fedit_loses_nothing_when_clients_agree() -> None:
    state = lora(3, 0)
    reply = trained(FedITRule(ALPHA), 1, state, 1)
    outcome = aggregate(FedITRule(ALPHA), 1, state, [Update("a", 2, reply), Update("b", 5, reply)])
    assert outcome.diagnostics["aggregation-error/model.layers.0"] < 1e-6


def test_fedits_error_is_not_told_of_what_is_no_mean() -> None:
    state = lora(3, 0)
    updates = [Update(f"c{k}", 1, trained(FedITRule(), 1, state, k)) for k in range(3)]
    found = aggregate(FedITRule(None, MedianConfig()), 1, state, updates).diagnostics
    assert not [name for name in found if name.startswith("aggregation-error")]


@pytest.mark.parametrize("rule", [FedITRule(), FFALoRARule(), RoLoRARule()], ids=["fedit", "ffa-lora", "rolora"])
def test_clients_of_different_alpha_cannot_be_averaged(rule: Rule) -> None:
    state = lora(2, 0)
    updates = [Update(f"c{k}", 1, trained(rule, 1, state, k), alpha) for k, alpha in enumerate((16.0, 8.0))]
    with pytest.raises(AggregationError, match=r"lora-alpha is 16\.0 at c0 and 8\.0 at c1"):
        aggregate(rule, 1, state, updates)


def test_drift_is_that_of_the_clients_changes() -> None:
    rule, state = FedFTGRule(), weights(0)
    replies = [trained(rule, 1, state, k) for k in range(3)]
    found = aggregate(rule, 1, state, [Update(f"c{k}", 1 + k, r) for k, r in enumerate(replies)]).diagnostics
    for group in ("model.layers.0", "model.layers.1"):
        names = [name for name in state if name.startswith(group)]
        moves = [np.concatenate([(doubles(r)[n] - doubles(state)[n]).ravel() for n in names]) for r in replies]
        units = [m / np.linalg.norm(m) for m in moves]
        cosines = [units[i] @ units[j] for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found[f"client-norm/{group}"] == pytest.approx(np.mean([np.linalg.norm(m) for m in moves]), rel=1e-5)
        assert found[f"client-cosine/{group}"] == pytest.approx(np.mean(cosines), abs=1e-5)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("clients", [1, 3, 40])
def test_factors_average_exactly_also_where_their_sum_becomes_dense(clients: int, common: bool, known: bool) -> None:
    """Forty clients of rank 2 have more directions than the weight; each decays by another factor, one came dense.

    With ``known`` admission has told the updates' norms.
    """
    g, name, shape = torch.Generator().manual_seed(clients), "model.layers.0.up_proj.weight", (24, 16)
    state, basis = {name: torch.randn(shape, generator=g)}, torch.linalg.qr(torch.randn(16, 2, generator=g)).Q.T
    updates, changes = [], []
    for k in range(1, clients + 1):
        pair = (1e-2 * torch.randn(24, 2, generator=g), basis if common else torch.randn(2, 16, generator=g))
        factors = Factors(1 - 1e-3 * k, [pair], common)
        change = (factors.decay - 1) * state[name].double() + pair[0].double() @ pair[1].double()
        dense = k == 2 and not common
        whole = {name: (state[name].double() + change).float()} if dense else {}
        norms = {name: float(change.norm())} if known else {}
        updates.append(Update(f"{k}", k, whole, None, {} if dense else {name: factors}, norms=norms))
        changes.append(change.numpy())
    got = aggregate(FedFTGRule(shared=(0, 2) if common else None, whole=True), 1, state, updates)
    exact = weighted_mean(changes, range(1, clients + 1))
    assert close(got.state[name].double().numpy() - state[name].double().numpy(), exact, 1e-4)
    norms = [np.linalg.norm(change) for change in changes]
    assert got.diagnostics["client-norm/model.layers.0"] == pytest.approx(np.mean(norms), rel=1e-5)
    if clients > 1:
        units = np.stack([(change / norm).ravel() for change, norm in zip(changes, norms, strict=True)])
        pairs = (units @ units.T).sum() - clients
        assert got.diagnostics["client-cosine/model.layers.0"] == pytest.approx(
            pairs / (clients * (clients - 1)), abs=1e-5
        )
