"""How far a site takes a state to go: as far as sites that move every number the furthest that Adam can."""

from typing import Any

import pytest
import torch

from client.reach import Known, Reach
from common.config.federation import FederationConfig
from common.config.strategy import names
from common.errors import WireError
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B, fresh_a
from common.protocol.tensors import Tensors
from strategies.admission.bounds import adam_path
from strategies.flower.named import make_rule
from strategies.rule import Update
from strategies.server_optimizer import ServerOptimizer
from strategies.way_down import WayDown

LAYER, OUT, IN, RANK = "layers.0.q", 12, 20, 3
OPTIMIZERS = [
    None,
    {"method": "fedavgm", "momentum": 0.9},
    {"method": "fedadam", "learning_rate": 0.05, "tau": 1e-4},
    {"method": "fedadam", "learning_rate": 0.05, "beta1": 0.9, "beta2": 0.5},
]


def federation(strategy: str, **changes: Any) -> FederationConfig:
    section = {"name": strategy, "rank": RANK} | ({} if strategy == "fedftg" else {"lora_alpha": 6.0})
    section |= {key: changes.pop(key) for key in ("downlink_rank",) if key in changes}
    data = {"name": "f", "model": {"path": "m"}, "strategy": section, "rounds": 4}
    training = {"local_steps": 5, "learning_rate": 0.01, "weight_decay": 0.01, **changes.pop("training", {})}
    return FederationConfig.model_validate({**data, "training": training, **changes})


def first_state(strategy: str) -> Tensors:
    g = torch.Generator().manual_seed(0)
    if strategy == "fedftg":
        return {LAYER: torch.randn(OUT, IN, generator=g)}
    state = {LAYER + LORA_A: fresh_a(0, 1, LAYER + LORA_A, (RANK, IN)), LAYER + LORA_B: torch.zeros(OUT, RANK)}
    if strategy == "fedsa-lora":
        del state[LAYER + LORA_B]
    if strategy in ("fedex-lora", "flora"):
        state[LAYER + BASE_WEIGHT] = torch.randn(OUT, IN, generator=g)
    return state


def states(config: FederationConfig) -> list[Tensors]:
    """After every round, the first state first, of three sites that all run as far as they can."""
    strategy, training = config.strategy, config.training
    rule = make_rule(strategy, seed=0)
    rank, before = rule.downlink_rank(), {}
    way_down = None if rank is None else WayDown(rank)
    optimizer = None if config.server_optimizer is None else ServerOptimizer(config.server_optimizer)
    g, found = torch.Generator().manual_seed(1), [first_state(strategy.name)]
    furthest = training.learning_rate * adam_path(training.steps(0), strategy)
    signs = {name: torch.randn(tensor.shape, generator=g).sign() for name, tensor in found[0].items()}
    for number in range(1, config.rounds + 1):
        state = found[-1]
        active, updates = rule.active(number, state), []
        for client in range(3):
            tensors = {}
            for name in active:
                flip = torch.rand(state[name].shape, generator=g) < 0.1 * client  # most go the same way, every round
                change = torch.where(flip, -furthest, furthest) * signs[name]
                if strategy.trains == "weights":  # a step of rank r, as long as that of its projection
                    u, s, v = torch.linalg.svd(change, full_matrices=False)
                    low = u[:, :RANK] * s[:RANK] @ v[:RANK]
                    change = low / low.norm() * strategy.scale * furthest * (RANK * max(OUT, IN)) ** 0.5
                tensors[name] = state[name] + change
            updates.append(Update(f"site-{client}", 1 + client, tensors, getattr(strategy, "lora_alpha", None)))
        before = state
        if way_down is not None:
            found.append(way_down.aggregate(rule, optimizer, number, state, iter(updates)).state)
            continue
        outcome = rule.aggregate(number, state, iter(updates))
        found.append((optimizer.step(active, state, outcome) if optimizer else outcome).state)
    if way_down is not None:
        found[-1] = way_down.settle(before, found[-1]).state
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("strategy", names())
def test_what_sites_can_do_is_taken_every_round_and_after_absence(
    strategy: str, optimizer: dict[str, Any] | None
) -> None:
    config = federation(strategy)
    if optimizer is not None:
        if not config.strategy.takes_server_optimizer:
            return
        config = federation(strategy, server_optimizer=optimizer)
    found, reach = states(config), Reach(config, 9)
    assert any(not torch.equal(tensor, found[0][name]) for name, tensor in found[-1].items())
    always, returns = Known(found[0]), Known(found[0])
    for after, state in enumerate(found):
        always.take(state, after, reach)
        Known(found[0]).take(state, after, reach)  # a new process
    for after in (1, 4, 2):  # the last is late
        returns.take(found[after], after, reach)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_round_may_bring_what_the_rounds_before_it_have_left(optimizer: dict[str, Any] | None) -> None:
    config = federation("fedftg", downlink_rank=1, server_optimizer=optimizer)
    found, reach = states(config), Reach(config, 9)
    for since, after in ((0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (1, 4), (0, 4)):
        reach.check(found[after], found[since], reach.rounds(since, after), since == 0)
    with pytest.raises(WireError, match=f"{LAYER}: .* allowed: up to"):
        reach.check({LAYER: found[2][LAYER] + 30.0}, found[1], reach.rounds(1, 2), False)


@pytest.mark.parametrize("strategy", names())
def test_what_sites_cannot_do_is_refused(strategy: str) -> None:
    found, config = states(federation(strategy)), federation(strategy)
    for name in found[0]:
        known = Known(found[0])
        known.take(found[1], 1, Reach(config, 9))
        tensor = found[2][name].clone()
        tensor[0, 0] += 30.0
        with pytest.raises(WireError, match=f"{name}: .* allowed: up to"):
            known.take({**found[2], name: tensor}, 2, Reach(config, 9))


def test_largest_site_is_what_admission_allows_or_ten_thousand_times_oneself() -> None:
    state = first_state("fedit")
    epochs = {"local_steps": None, "local_epochs": 1, "batch_size": 4, "weight_decay": 0.0}
    told = federation("fedit", training=epochs, admission={"max_rows": 40})
    guessed = federation("fedit", training=epochs)
    for config, rows in ((told, 40), (guessed, 20_000)):
        most = 2 * 0.01 * adam_path(rows // 4, config.strategy)
        for factor, taken in ((0.99, True), (1.01, False)):
            moved = {name: tensor + factor * most for name, tensor in state.items()}
            if taken:
                Known(state).take(moved, 1, Reach(config, 2))
                continue
            with pytest.raises(WireError, match="an entry moved by"):
                Known(state).take(moved, 1, Reach(config, 2))


def test_noise_of_other_sites_is_within_reach() -> None:
    config, g = federation("fedit", admission={"max_noise": 3.0}), torch.Generator().manual_seed(2)
    state = first_state("fedit")
    noised = {name: tensor + 3.0 * torch.randn(tensor.shape, generator=g) for name, tensor in state.items()}
    Known(state).take(noised, 1, Reach(config, 9))
    with pytest.raises(WireError, match="an entry moved by"):
        Known(state).take(noised, 1, Reach(federation("fedit"), 9))


def test_plain_sgd_without_clipping_is_held_to_its_size() -> None:
    config = federation("fedit", training={"optimizer": "sgd", "max_grad_norm": None})
    state = first_state("fedit")
    Known(state).take({name: tensor + 10 for name, tensor in state.items()}, 1, Reach(config, 9))
    with pytest.raises(WireError, match="it moved by a norm of"):
        Known(state).take({name: tensor + 1e4 for name, tensor in state.items()}, 1, Reach(config, 9))
