"""FedSVD against dense SVDs in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from strategies.fedsvd import FedSVDRule
from strategies.ffa_lora import FFALoRARule
from strategies.lora_names import LORA_A
from strategies.rule import Tensors, Update
from tests.harness.rounds import ALPHA, HEAD, LAYERS, aggregate, close, doubles, lora, product, trained, weighted_mean

EXAMPLES = (3, 1, 7)


def updates(rule: FedSVDRule, server_round: int, state: Tensors, seed: int) -> list[Update]:
    replies = [trained(rule, server_round, state, seed + k) for k in range(len(EXAMPLES))]
    return [Update(f"c{k}", n, r, ALPHA) for k, (n, r) in enumerate(zip(EXAMPLES, replies, strict=True))]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_product_is_the_mean_of_products_and_a_has_its_right_singular_vectors(rank: int, seed: int) -> None:
    rule, state = FedSVDRule(ALPHA), lora(rank, seed)
    for server_round in (1, 2, 3):
        sent = updates(rule, server_round, state, seed + 10 * server_round)
        whole = [{**state, **update.tensors} for update in sent]
        after = aggregate(rule, server_round, state, sent).state
        for layer in LAYERS:
            exact = weighted_mean([product(one, layer) for one in whole], EXAMPLES)
            assert close(product(after, layer), exact, 1e-5)
            a, b = (doubles(after)[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            assert np.allclose(a @ a.T, np.eye(len(a)), atol=1e-5)
            assert np.allclose(np.linalg.norm(b, axis=0), np.linalg.svd(exact)[1][: len(a)], rtol=1e-3, atol=1e-4)
            assert np.allclose(b.T @ b - np.diag(np.square(np.linalg.norm(b, axis=0))), 0.0, atol=1e-3)
        assert close(doubles(after)[HEAD], weighted_mean([doubles(u.tensors)[HEAD] for u in sent], EXAMPLES))
        state = after


def test_model_is_that_of_ffa_lora_after_one_round() -> None:
    rule, state = FedSVDRule(ALPHA), lora(3, 1)
    sent = updates(rule, 1, state, 5)
    svd, ffa = (aggregate(r, 1, state, sent).state for r in (rule, FFALoRARule(ALPHA)))
    for layer in LAYERS:
        assert close(product(svd, layer), product(ffa, layer), 1e-5)
        assert not close(doubles(svd)[f"{layer}.lora_A.weight"], doubles(ffa)[f"{layer}.lora_A.weight"], 0.1)


def test_clients_send_b_and_the_head_alone() -> None:
    state = lora(2, 0)
    assert [name for name in FedSVDRule().active(1, state) if name.endswith(LORA_A)] == []
    assert {*FedSVDRule().active(2, state)} == {name for name in state if not name.endswith(LORA_A)}


@pytest.mark.parametrize("lost", [1, 3])
def test_directions_that_b_does_not_use_stay_trainable(lost: int) -> None:
    """Columns of B may be zero, all of them in the beginning: then their rows of A are new, and not zero."""
    rule, state = FedSVDRule(ALPHA), lora(3, 2)
    for layer in LAYERS:
        state[f"{layer}.lora_B.weight"][:, 3 - lost :] = 0
    same = [
        Update(f"c{k}", n, {x: state[x].clone() for x in rule.active(1, state)}, ALPHA) for k, n in enumerate((2, 5))
    ]
    after = aggregate(rule, 1, state, same).state
    for layer in LAYERS:
        a = after[f"{layer}.lora_A.weight"]
        assert torch.all(a.norm(dim=1) > 0.5)
        assert close(product(after, layer), product(state, layer), 1e-5) or lost == 3
        assert torch.linalg.matrix_rank(a) == 3
