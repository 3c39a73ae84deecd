"""FlexLoRA against the dense average and its dense SVD in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from common.errors import AggregationError
from strategies.flexlora import FlexLoRARule
from strategies.rule import Tensors, Update
from tests.harness.rounds import (
    ALPHA,
    HEAD,
    LAYERS,
    aggregate,
    close,
    doubles,
    lora,
    product,
    truncated,
    weighted_mean,
)

A, B = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
SMALLEST = 5  # of all layers' sides


def exact_average(replies: list[Tensors], examples: list[int], scalings: list[float], layer: str) -> np.ndarray:
    return weighted_mean([product(r, layer, s) for r, s in zip(replies, scalings, strict=True)], examples)


clients = st.lists(
    st.tuples(st.integers(1, SMALLEST), st.sampled_from([1.0, 8.0, 16.0, 40.0]), st.integers(1, 1000)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(clients, st.integers(1, SMALLEST), st.booleans(), st.integers(0, 10**6))
def test_state_and_every_clients_share_are_the_best_approximations(
    clients: list[tuple[int, float, int]], whole: int, rslora: bool, seed: int
) -> None:
    rule = FlexLoRARule(ALPHA, rslora=rslora)

    def scaling(alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if rslora else rank)

    state = lora(whole, seed)
    replies = [lora(rank, seed + 1 + k) for k, (rank, _, _) in enumerate(clients)]
    updates = [Update(f"c{k}", n, r, alpha) for k, ((_, alpha, n), r) in enumerate(zip(clients, replies, strict=True))]
    after = aggregate(rule, 1, state, updates).state
    scalings = [scaling(alpha, rank) for rank, alpha, _ in clients]
    size = max(whole, *(rank for rank, _, _ in clients))
    for layer in LAYERS:
        exact = exact_average(replies, [n for _, _, n in clients], scalings, layer)
        assert after[f"{layer}.lora_A.weight"].shape[0] == size
        assert close(product(after, layer, scaling(ALPHA, size)), truncated(exact, size), 1e-5)
        for rank, alpha in ((1, 4.0), (size, 12.0), *((rank, alpha) for rank, alpha, _ in clients)):
            own = rule.state_for(after, rank, alpha)
            assert own[f"{layer}.lora_B.weight"].shape[1] == min(rank, size)
            sent = product(own, layer, scaling(alpha, min(rank, size)))
            best = np.linalg.norm(exact - truncated(exact, rank))
            assert np.linalg.norm(exact - sent) <= best + 1e-5 * np.linalg.norm(exact)
    assert close(doubles(after)[HEAD], weighted_mean([doubles(r)[HEAD] for r in replies], [n for _, _, n in clients]))


def test_three_rounds_of_ranks_4_8_16_with_different_alpha() -> None:
    """Each client trains what it received; the state follows the dense average of the products, round after round."""
    g = torch.Generator().manual_seed(0)
    rule, ranks, alphas, examples = FlexLoRARule(32.0), (4, 8, 16), (8.0, 8.0, 32.0), [3, 1, 7]
    scalings = [alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)]
    state = {"q.lora_A.weight": torch.randn(16, 40, generator=g), "q.lora_B.weight": torch.zeros(30, 16)}
    for server_round in (1, 2, 3):
        replies = []
        for rank, alpha in zip(ranks, alphas, strict=True):
            own = rule.state_for(state, rank, alpha)
            replies.append({n: t + 0.1 * torch.randn(*t.shape, generator=g) for n, t in own.items()})
        exact = exact_average(replies, examples, scalings, "q")
        updates = [Update(f"c{k}", examples[k], replies[k], alphas[k]) for k in range(3)]
        state = aggregate(rule, server_round, state, updates).state
        assert close(product(state, "q", 2.0), truncated(exact, 16), 1e-5)
        for rank, alpha, scaling in zip(ranks, alphas, scalings, strict=True):
            assert close(product(rule.state_for(state, rank, alpha), "q", scaling), truncated(exact, rank), 1e-5)


def test_a_clients_own_scaling_counts() -> None:
    """The error of released code: with the state's scaling in place of the client's, the average is another one."""
    state, reply = lora(4, 0), lora(2, 1)
    after = aggregate(FlexLoRARule(ALPHA), 1, state, [Update("a", 1, reply, 2.0)]).state
    layer = "model.layers.0.q_proj"
    assert close(product(after, layer, ALPHA / 4), product(reply, layer, 2.0 / 2), 1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_turning_a_clients_factors_changes_nothing(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    state, replies = lora(4, seed), [lora(4, seed + 1), lora(4, seed + 2)]
    mix = torch.linalg.qr(torch.randn(4, 4, generator=g))[0] * torch.tensor([3.0, 1.0, 0.5, 0.1])
    turned = dict(replies[0])
    for layer in LAYERS:
        turned[f"{layer}.lora_B.weight"] = replies[0][f"{layer}.lora_B.weight"] @ mix
        turned[f"{layer}.lora_A.weight"] = torch.linalg.inv(mix) @ replies[0][f"{layer}.lora_A.weight"]
    results = [
        aggregate(FlexLoRARule(ALPHA), 1, state, [Update("a", 2, first), Update("b", 3, replies[1])]).state
        for first in (replies[0], turned)
    ]
    for layer in LAYERS:
        assert close(product(results[0], layer), product(results[1], layer), 1e-5)


def test_first_round_without_change_keeps_a_and_leaves_b_zero() -> None:
    state = lora(4, 0, head=False)
    for layer in LAYERS:
        state[f"{layer}.lora_B.weight"].zero_()
    after = aggregate(FlexLoRARule(ALPHA), 1, state, [Update("a", 1, dict(state)), Update("b", 2, dict(state))]).state
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_directions_that_are_missing_are_padded_so_that_they_can_be_trained() -> None:
    state, reply = lora(4, 0), lora(4, 1)
    reply[B][:, 1:] = 0  # dW of the layer has rank 1
    after = aggregate(FlexLoRARule(ALPHA), 1, state, [Update("a", 1, reply)]).state
    a, b = doubles(after)[A], doubles(after)[B]
    assert (np.linalg.norm(b, axis=0) > 0).tolist() == [True, False, False, False]
    np.testing.assert_allclose(a[1:] @ a.T, np.eye(4)[1:], atol=1e-6)
    assert close(product(after, "model.layers.0.q_proj"), product(reply, "model.layers.0.q_proj"), 1e-5)


def test_cancelling_clients_give_zero_and_no_nan() -> None:
    state, reply = lora(4, 0, head=False), lora(4, 1, head=False)
    opposite = {name: -t if ".lora_B." in name else t for name, t in reply.items()}
    after = aggregate(FlexLoRARule(ALPHA), 1, state, [Update("a", 1, reply), Update("b", 1, opposite)]).state
    assert not after[B].any()
    assert torch.equal(after[A], state[A])


def test_two_runs_agree_bit_for_bit() -> None:
    state = lora(4, 0)
    updates = [Update(f"c{k}", k + 1, lora(4, k + 1)) for k in range(3)]
    first, second = (aggregate(FlexLoRARule(ALPHA), 1, state, updates).state for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in state)


def test_state_for_the_states_own_rank_and_alpha_is_the_state() -> None:
    state = lora(4, 0)
    for own in (FlexLoRARule(ALPHA).state_for(state, None, None), FlexLoRARule(ALPHA).state_for(state, 4, ALPHA)):
        assert all(torch.equal(own[name], state[name]) for name in state)


def test_without_any_alpha_equal_ranks_need_none() -> None:
    state, replies = lora(4, 0), [lora(4, 1), lora(4, 2)]
    after = aggregate(FlexLoRARule(), 1, state, [Update(f"c{k}", 1, r) for k, r in enumerate(replies)]).state
    for layer in LAYERS:
        exact = (product(replies[0], layer) + product(replies[1], layer)) / 2
        assert close(product(after, layer), truncated(exact, 4), 1e-5)


def test_alpha_that_is_missing_where_ranks_differ_is_refused_by_client() -> None:
    updates = [Update("a", 1, lora(4, 1)), Update("b", 1, lora(2, 2))]
    with pytest.raises(AggregationError, match=rf"b: {A} has rank 2, the state 4; .*lora-alpha.* is needed"):
        aggregate(FlexLoRARule(), 1, lora(4, 0), updates)


def test_state_without_factors_or_with_half_a_pair_is_refused() -> None:
    with pytest.raises(AggregationError, match="no LoRA factor among 1 tensors"):
        FlexLoRARule(ALPHA).state_for({"x.weight": torch.zeros(2, 2)}, 4, None)
    with pytest.raises(AggregationError, match=rf"{A} has no partner {B}"):
        FlexLoRARule(ALPHA).state_for({A: torch.zeros(2, 2)}, 4, None)


def test_diagnostics_equal_those_of_the_dense_average() -> None:
    state, replies, examples = lora(3, 0), [lora(3, k + 1) for k in range(3)], [3, 1, 7]
    updates = [Update(f"c{k}", n, r, ALPHA) for k, (n, r) in enumerate(zip(examples, replies, strict=True))]
    found = aggregate(FlexLoRARule(ALPHA), 1, state, updates).diagnostics
    for group in ("model.layers.0", "model.layers.1"):
        layers = [layer for layer in LAYERS if layer.startswith(group)]
        exact = {x: exact_average(replies, examples, [ALPHA / 3] * 3, x) for x in layers}
        spectra = [np.linalg.svd(exact[x], compute_uv=False) for x in layers]
        lost = sum((s[3:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra)
        assert found[f"truncation-loss/{group}"] == pytest.approx(lost, rel=1e-4)
        assert found[f"numerical-rank/{group}"] == max(np.linalg.matrix_rank(exact[x], 1e-5) for x in layers)
        assert found[f"stable-rank/{group}"] == pytest.approx(max((s**2).sum() / s[0] ** 2 for s in spectra), rel=1e-4)
        moves = [
            np.concatenate([(product(r, x, ALPHA / 3) - product(state, x, ALPHA / 3)).ravel() for x in layers])
            for r in replies
        ]
        cosines = [
            moves[i] @ moves[j] / np.linalg.norm(moves[i]) / np.linalg.norm(moves[j])
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        assert found[f"client-norm/{group}"] == pytest.approx(np.mean([np.linalg.norm(m) for m in moves]), rel=1e-4)
        assert found[f"client-cosine/{group}"] == pytest.approx(np.mean(cosines), abs=1e-4)
