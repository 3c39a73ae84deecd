"""What clients of a Flower strategy say of their alpha and rank."""

import pytest
import torch

import strategies
from common.errors import RefusedUpdate
from common.protocol import wire
from strategies.flora import FLoRARule
from strategies.flower.strategy import FlowerStrategy
from tests.harness.rounds import base_weights, lora
from tests.strategies.test_flower import NEEDS_ALPHA, A, B, answer, ask


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_a_positive_number(alpha: float) -> None:
    strategy, state = strategies.FlexLoRA(16.0), lora(2, 0)
    message = ask(strategy, state)[0]
    with pytest.raises(RefusedUpdate, match=r"node-1: lora-alpha is .*; allowed: a positive number"):
        strategy.read_update(answer(message, state, {"lora-alpha": alpha}))


def test_alpha_other_than_the_federations_is_refused_where_it_must_be_common() -> None:
    state = lora(2, 0)
    for strategy in (strategies.FedIT(16.0), strategies.RoLoRA(16.0), strategies.FFALoRA(16.0)):
        message = ask(strategy, state)[0]
        with pytest.raises(RefusedUpdate, match=r"node-1: lora-alpha is 8\.0; the federation's is 16\.0"):
            strategy.read_update(answer(message, state, {"lora-alpha": 8.0}))


@pytest.mark.parametrize("strategy", [strategies.FlexLoRA(16.0), strategies.FLoRA(16.0)], ids=["flexlora", "flora"])
@pytest.mark.parametrize(
    ("alpha", "larger", "says"),
    [
        (5e-324, 1.0, r"lora-alpha is 5e-324; allowed: 1e-06 to 1e\+06"),
        (1e14, 1.0, r"lora-alpha is 100000000000000.0; allowed: 1e-06 to 1e\+06"),
        (1e300, 1.0, r"lora-alpha is 1e\+300; allowed: a positive number up to 1e\+15"),
        (1e6, 1e20, r"lora_A.weight: a norm of .*; allowed: up to 1e\+12"),
        (1e-6, 1.0, None),
        (1e6, 1e11, None),
    ],
)
def test_mixed_alphas_neither_crash_nor_poison(
    strategy: FlowerStrategy, alpha: float, larger: float, says: str | None
) -> None:
    rule = strategy.rule
    state = lora(2, 0) | (base_weights(0) if isinstance(rule, FLoRARule) else {})
    one, two = ask(strategy, state)
    wild = {name: tensor * larger for name, tensor in lora(2, 9).items()}
    frozen = {"frozen-digest": str(one.content.config_records["config"].get("frozen-digest", ""))}
    replies = [
        answer(one, lora(2, 8), {"lora-alpha": 8.0}, frozen),
        answer(two, wild, {"lora-alpha": alpha}, frozen),
    ]
    if says is not None:
        with pytest.raises(RefusedUpdate, match=f"node-2: .*{says}"):
            strategy.read_update(replies[1])
        return
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    state = wire.decode(arrays)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for message in ask(strategy, state, 2):
        sent = wire.decode(message.content.array_records["arrays"])
        assert all(torch.isfinite(tensor).all() for tensor in sent.values())


@pytest.mark.parametrize("told", [[None, 16.0], [16.0, None], [None, None]])
@pytest.mark.parametrize("name", ["FedIT", "FedFTG", "FedExLoRA"])
def test_client_that_tells_no_alpha_ends_no_round(name: str, told: list[float | None]) -> None:
    """Nor does one that tells one where there is none."""
    strategy = getattr(strategies, name)(**NEEDS_ALPHA.get(name, {}))
    state = lora(2, 0) | (base_weights(0) if name == "FedExLoRA" else {})
    messages = ask(strategy, state)
    frozen = {"frozen-digest": str(messages[0].content.config_records["config"].get("frozen-digest", ""))}
    replies = [
        answer(m, lora(2, k), {} if alpha is None else {"lora-alpha": alpha}, frozen)
        for k, (m, alpha) in enumerate(zip(messages, told, strict=True))
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    for key in lora(2, 0):
        torch.testing.assert_close(wire.decode(arrays)[key], (lora(2, 0)[key] + lora(2, 1)[key]) / 2)


def test_flexlora_sends_each_client_factors_of_the_rank_it_replied_with() -> None:
    strategy, state = strategies.FlexLoRA(16.0), lora(4, 0)
    one, two = ask(strategy, state)
    small = lora(2, 9)
    arrays, metrics = strategy.aggregate_train(
        1, [answer(one, lora(4, 8), {"lora-alpha": 16.0}), answer(two, small, {"lora-alpha": 6.0})]
    )
    assert arrays is not None
    assert metrics is not None
    assert any(key.startswith("truncation-loss/") for key in metrics)
    sent = [wire.decode(m.content.array_records["arrays"]) for m in ask(strategy, wire.decode(arrays), 2)]
    assert [s[A].shape[0] for s in sent] == [4, 2]
    assert [s[B].shape[1] for s in sent] == [4, 2]
