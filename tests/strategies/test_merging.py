"""FedEx-LoRA and FLoRA, which change the base weights, and FedSA-LoRA, against float64 over three rounds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.held_weights import Weights
from common.errors import AggregationError, RefusedUpdate
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B, cut, fresh_a
from common.protocol import wire
from common.protocol.factors import Exchange
from common.protocol.messages import TrainReply
from server.loop.checkpoint import Checkpoint, newest, save
from strategies.fedex_lora import FedExLoRARule
from strategies.fedit import FedITRule
from strategies.fedsa_lora import FedSALoRARule
from strategies.flora import FLoRARule
from strategies.flower.clients import Client
from strategies.flower.strategy import FlowerStrategy
from strategies.flower.versions import Versions
from strategies.rule import Tensors, Update
from tests.harness.rounds import (
    ALPHA,
    HEAD,
    LAYERS,
    aggregate,
    base_weights,
    close,
    doubles,
    effective,
    lora,
    product,
    trained,
    weighted_mean,
)

EXAMPLES = (3, 1, 7)
WIDE = {"model.layers.0.up_proj": (80, 60), "model.layers.1.down_proj": (60, 80)}  # whose changes go down in factors


def wide(rank: int) -> Tensors:
    """As they start: A random, B = 0."""
    g, state = torch.Generator().manual_seed(0), {}
    for layer, (out, in_) in WIDE.items():
        state[layer + LORA_A] = torch.randn(rank, in_, generator=g)
        state[layer + LORA_B] = torch.zeros(out, rank)
        state[layer + BASE_WEIGHT] = torch.randn(out, in_, generator=g)
    return state


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layers", [WIDE, LAYERS], ids=["in factors", "whole"])
def test_fedex_is_the_exact_average_of_the_clients_models(layers: dict[str, tuple[int, int]], rslora: bool) -> None:
    rule = FedExLoRARule(ALPHA, rslora=rslora)
    scaling = ALPHA / (2 if rslora else 4)
    state = wide(4) if layers is WIDE else lora(4, 0) | base_weights(1)
    for server_round in (1, 2, 3):
        replies = [trained(rule, server_round, state, 10 * server_round + k) for k in range(3)]
        updates = [Update(f"c{k}", n, r, ALPHA) for k, (n, r) in enumerate(zip(EXAMPLES, replies, strict=True))]
        outcome = aggregate(rule, server_round, state, updates)
        assert outcome.step is not None
        for layer in layers:
            models = [effective({**state, **reply}, layer, scaling) for reply in replies]
            before, wanted = effective(state, layer, scaling), weighted_mean(models, EXAMPLES)
            assert close(effective(outcome.state, layer, scaling) - before, wanted - before, 2e-6)
            assert (layer + BASE_WEIGHT in outcome.step.tensors) == (layers is LAYERS)
        for name in rule.active(server_round, state):
            assert close(doubles(outcome.state)[name], weighted_mean([doubles(r)[name] for r in replies], EXAMPLES))
        state = outcome.state


def test_fedexs_residual_is_what_fedit_loses() -> None:
    state = lora(4, 0)
    updates = [Update(f"c{k}", n, trained(FedITRule(), 1, state, k)) for k, n in enumerate(EXAMPLES)]
    ours = aggregate(FedExLoRARule(ALPHA), 1, state | base_weights(1), updates).diagnostics
    theirs = aggregate(FedITRule(), 1, state, updates).diagnostics
    for group in ("model.layers.0", "model.layers.1"):
        assert ours[f"residual/{group}"] == pytest.approx(theirs[f"aggregation-error/{group}"], rel=1e-4)
        assert ours[f"residual/{group}"] > 0.01


@pytest.mark.parametrize("rslora", [False, True])
def test_flora_adds_every_clients_product_whatever_its_rank(rslora: bool) -> None:
    rule, ranks, alphas = FLoRARule(ALPHA, rslora=rslora, seed=5), (1, 4, 2), (16.0, 8.0, None)
    state = wide(4)
    first = {name: tensor for name, tensor in state.items() if name.endswith(LORA_A)}
    for server_round in (1, 2, 3):
        g, updates, wanted = (
            torch.Generator().manual_seed(server_round),
            [],
            {x: doubles(state)[x + BASE_WEIGHT] for x in WIDE},
        )
        for rank, alpha, n in zip(ranks, alphas, EXAMPLES, strict=True):
            own = rule.state_for(state, rank, alpha)
            assert all(torch.equal(own[name], tensor[:rank]) for name, tensor in state.items() if name.endswith(LORA_A))
            reply = {m: t + 0.3 * torch.randn(t.shape, generator=g) for m, t in own.items() if ".lora_" in m}
            updates.append(Update(f"c{rank}", n, reply, alpha))
            scaling = (alpha or ALPHA) / (rank**0.5 if rslora else rank)
            for layer in WIDE:
                wanted[layer] = wanted[layer] + n / sum(EXAMPLES) * product(reply, layer, scaling)
        outcome = aggregate(rule, server_round, state, updates)
        assert outcome.step is not None
        for layer, weight in wanted.items():
            before = doubles(state)[layer + BASE_WEIGHT]
            assert close(doubles(outcome.state)[layer + BASE_WEIGHT] - before, weight - before, 2e-6)
            assert outcome.step.tensors[layer + BASE_WEIGHT + "/left"].shape[1] == sum(ranks)
            a = outcome.state[layer + LORA_A]
            assert not outcome.state[layer + LORA_B].any()
            assert torch.equal(a, fresh_a(5, server_round + 1, layer + LORA_A, a.shape))
            assert not any(torch.equal(a, other) for other in (state[layer + LORA_A], first[layer + LORA_A]))
        state = outcome.state


def test_fresh_a_is_drawn_as_peft_draws_it() -> None:
    a, again = (fresh_a(1, 2, "q", (64, 400)) for _ in range(2))
    assert torch.equal(a, again)
    assert float(a.abs().max()) <= 1 / 400**0.5
    layer = torch.nn.Linear(400, 64)
    drawn = torch.nn.init.kaiming_uniform_(layer.weight.detach(), a=5**0.5)
    assert float(a.std()) == pytest.approx(float(drawn.std()), rel=0.05)
    assert torch.equal(cut({"q" + LORA_A: a}, 3)["q" + LORA_A], a[:3])


@pytest.mark.parametrize("rule", [FedExLoRARule(ALPHA), FLoRARule(ALPHA)], ids=["fedex-lora", "flora"])
def test_site_that_follows_the_steps_and_a_resumed_server_hold_the_same_state(
    rule: FedExLoRARule | FLoRARule, tmp_path: Path
) -> None:
    versions, site = Versions(wide(2)), Weights(wide(2), lambda server_round: Exchange())
    assert site.version == versions.first
    for server_round in (1, 2, 3):
        state = versions.state
        updates = [
            Update(f"c{k}", n, trained(rule, server_round, state, 10 * server_round + k)) for k, n in enumerate((2, 5))
        ]
        outcome = aggregate(rule, server_round, state, updates)
        save(tmp_path, Checkpoint(server_round - 1, state, versions, 0), 1)
        read = newest(tmp_path, print)
        assert read is not None
        again = aggregate(rule, server_round, read.state, updates).state
        assert all(torch.equal(tensor, again[name]) for name, tensor in outcome.state.items())
        versions.advance(outcome)
        steps = versions.since(site.version)
        assert steps is not None
        assert sum(step.num_bytes for step in steps) < 0.5 * sum(4 * tensor.numel() for tensor in state.values())
        site.follow(steps, site.version, versions.latest)
        assert all(torch.equal(tensor, site.tensors[name]) for name, tensor in versions.state.items())


@pytest.mark.parametrize("rule", [FedExLoRARule(ALPHA), FLoRARule(ALPHA, max_rank=4)], ids=["fedex-lora", "flora"])
def test_what_is_sent_and_believed_where_base_weights_change(rule: FedExLoRARule | FLoRARule) -> None:
    strategy, state = FlowerStrategy(rule), wide(4)
    strategy.begin(state)
    strategy.clients[1] = Client("a", has_base=True)
    active = rule.active(1, state)

    def reply(tensors: Tensors) -> TrainReply:
        ((_, needs),) = strategy.train_states(1, state, [1])
        assert not needs.arrays  # who has the base model is sent nothing at first
        assert needs.active == active
        return TrainReply(server_round=1, arrays=wire.encode(tensors), num_examples=3)

    good = trained(rule, 1, state, 1)
    update = strategy.admit(reply(good), 1)
    assert update.tensors.keys() == set(active)
    layer = "model.layers.0.up_proj"
    changed = {layer + BASE_WEIGHT: state[layer + BASE_WEIGHT] + 1}
    in_factors = {n: t for n, t in good.items() if n != layer + LORA_A} | {layer + LORA_A + "/left": torch.zeros(4, 1)}
    any_rank = rule.section.mixed_ranks
    larger = {n: torch.cat([t, t], int(n.endswith(LORA_B))) for n, t in good.items()}
    for tensors, says in (
        (good | changed, r"base_layer.weight is frozen in this round but came back changed"),
        (in_factors, r"lora_A.weight/left' was not to come; allowed: 6 others"),
        (
            larger,
            r"rank 8; allowed: 1 to 4" if any_rank else r"has shape \(8, 60\), expected \(4, 60\)",
        ),
    ):
        with pytest.raises(RefusedUpdate, match=says):
            strategy.admit(reply(tensors), 1)


def test_base_weight_that_is_missing_is_named() -> None:
    for rule in (FedExLoRARule(ALPHA), FLoRARule(ALPHA)):
        with pytest.raises(AggregationError, match=r"has no base weight .*base_layer\.weight"):
            aggregate(rule, 1, lora(4, 0), [])


def test_fedsa_averages_a_and_wants_no_b() -> None:
    rule, state = FedSALoRARule(ALPHA), {n: t for n, t in lora(4, 0).items() if not n.endswith(LORA_B)}
    for server_round in (1, 2, 3):
        replies = [trained(rule, server_round, state, 10 * server_round + k) for k in range(3)]
        updates = [Update(f"c{k}", n, r, ALPHA) for k, (n, r) in enumerate(zip(EXAMPLES, replies, strict=True))]
        state = aggregate(rule, server_round, state, updates).state
        for name in state:
            assert name == HEAD or name.endswith(LORA_A)
            assert np.allclose(
                doubles(state)[name], weighted_mean([doubles(r)[name] for r in replies], EXAMPLES), atol=1e-6
            )
    with pytest.raises(AggregationError, match="FedSA-LoRA leaves B to the clients"):
        aggregate(rule, 1, lora(4, 0), [])
