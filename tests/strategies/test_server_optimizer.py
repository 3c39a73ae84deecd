"""Server optimizers against float64 computations over three rounds, for every strategy that takes one."""

from pathlib import Path

import numpy as np
import pytest
import torch

import strategies
from common.config.aggregation import FedAdamConfig, FedAvgMConfig, MedianConfig, ServerOptimizerConfig
from common.config.strategy import FedFTGConfig, FlexLoRAConfig
from common.protocol.factors import Factors
from common.protocol.tensors import flatten
from server.loop.checkpoint import Checkpoint, newest, save
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.flower.named import make_strategy
from strategies.flower.strategy import FlowerStrategy
from strategies.rolora import RoLoRARule
from strategies.rule import Rule, Tensors, Update
from tests.harness.rounds import ALPHA, Arrays, close, doubles, lora, trained, weighted_mean, weights

EXAMPLES = (3, 1, 7)
MOMENTUM, ADAM = FedAvgMConfig(learning_rate=0.7, momentum=0.6), FedAdamConfig(learning_rate=0.05, beta2=0.9, tau=0.01)
RULES = {
    "fedftg": FedFTGRule(whole=True),
    "fedit": FedITRule(ALPHA),
    "ffa-lora": FFALoRARule(ALPHA),
    "rolora": RoLoRARule(ALPHA),
    "fedit, median": FedITRule(ALPHA, MedianConfig()),
}
each = pytest.mark.parametrize("rule", list(RULES.values()), ids=list(RULES))
either = pytest.mark.parametrize("config", [MOMENTUM, ADAM], ids=["fedavgm", "fedadam"])


def start(rule: Rule) -> Tensors:
    return weights(0) if rule.section.trains == "weights" else lora(4, 0)


def updates(rule: Rule, server_round: int, state: Tensors) -> list[Update]:
    return [
        Update(f"c{k}", n, trained(rule, server_round, state, 10 * server_round + k)) for k, n in enumerate(EXAMPLES)
    ]


def expected(config: ServerOptimizerConfig, before: Arrays, average: Arrays, memory: dict[str, Arrays]) -> Arrays:
    """One step in float64; the tensors of ``average`` alone move. ``memory`` is brought up to date."""
    after = dict(before)
    first, second = memory.setdefault("first", {}), memory.setdefault("second", {})
    for name, mean in average.items():
        change = mean - before[name]
        if isinstance(config, FedAvgMConfig):
            first[name] = config.momentum * first.get(name, 0.0) + change
            after[name] = before[name] + config.learning_rate * first[name]
        else:
            first[name] = config.beta1 * first.get(name, 0.0) + (1 - config.beta1) * change
            second[name] = config.beta2 * second.get(name, config.tau**2) + (1 - config.beta2) * change**2
            after[name] = before[name] + config.learning_rate * first[name] / (np.sqrt(second[name]) + config.tau)
    return after


@each
@either
def test_three_rounds_follow_the_papers_formulas(rule: Rule, config: ServerOptimizerConfig) -> None:
    strategy = FlowerStrategy(rule, server_optimizer=config)
    state, memory = start(rule), {}
    for server_round in (1, 2, 3):
        replies = updates(rule, server_round, state)
        active, before = rule.active(server_round, state), doubles(state)
        of_clients = {name: [doubles(u.tensors)[name] for u in replies] for name in active}
        robust = isinstance(rule, FedITRule) and rule.aggregation == MedianConfig()
        average = {
            name: np.median(np.stack(values), axis=0) if robust else weighted_mean(values, EXAMPLES)
            for name, values in of_clients.items()
        }
        wanted = expected(config, before, average, memory)
        state = strategy.combine(server_round, state, iter(replies)).state
        for name, tensor in state.items():
            moved = doubles(state)[name] - before[name]
            assert close(moved, wanted[name] - before[name], 2e-5), (server_round, name)
            assert tensor.dtype == torch.float32


@either
def test_fedftgs_factors_become_whole_weights_and_stay_exact(config: ServerOptimizerConfig) -> None:
    """Also where factors travel rounded: the average itself is not rounded before the step."""
    strategy = make_strategy(
        FedFTGConfig(rank=1, subspace="shared", wire_precision="int8"), seed=5, server_optimizer=config
    )
    state, memory = weights(0), {}
    strategy.begin(state)
    for server_round in (1, 2, 3):
        g, exchange, before = (
            torch.Generator().manual_seed(server_round),
            strategy.rule.exchange(server_round),
            doubles(state),
        )
        assert exchange is not None
        assert exchange.basis is not None
        replies, means = [], {name: np.zeros(tensor.shape) for name, tensor in state.items()}
        for n in EXAMPLES:
            factors = {}
            for name, tensor in state.items():
                basis, high = exchange.basis(name, tensor.shape), torch.randn(tensor.shape[0], 1, generator=g)
                factors[name] = Factors(0.99, [(high, basis)], common=True)
                whole = 0.99 * before[name] + high.double().numpy() @ basis.double().numpy()
                means[name] += n / sum(EXAMPLES) * whole
            replies.append(Update(f"c{n}", n, {}, None, factors))
        wanted = expected(config, before, means, memory)
        outcome = strategy.combine(server_round, state, iter(replies))
        assert outcome.step is None
        assert not [name for name in outcome.diagnostics if name.startswith("wire-error")]
        state = outcome.state
        assert all(close(doubles(state)[name], wanted[name], 1e-6) for name in state)
        assert strategy.versions is not None
        assert strategy.versions.state is state
        assert strategy.versions.since(strategy.versions.first) is None  # whole weights go down


@either
def test_rolora_moves_only_the_rounds_factor_and_its_moments(config: ServerOptimizerConfig) -> None:
    rule, state = RoLoRARule(ALPHA), lora(4, 0)
    strategy = FlowerStrategy(rule, server_optimizer=config)
    assert strategy.server_optimizer is not None
    for server_round in (1, 2, 3, 4):
        kept = flatten(strategy.server_optimizer.moments)
        after = strategy.combine(server_round, state, iter(updates(rule, server_round, state))).state
        resting = state.keys() - set(rule.active(server_round, state))
        assert resting
        assert all(torch.equal(after[name], state[name]) for name in resting)
        for name, tensor in kept.items():
            still = torch.equal(tensor, flatten(strategy.server_optimizer.moments)[name])
            assert still == (name.partition("|")[2] in resting)
        state = after


def test_full_steps_without_momentum_are_plain_averaging() -> None:
    rule, state = FedITRule(ALPHA), lora(4, 0)
    config = FedAvgMConfig(learning_rate=1.0, momentum=0.0)
    replies = updates(rule, 1, state)
    plain, stepped = (
        FlowerStrategy(rule, server_optimizer=one).combine(1, state, iter(replies)).state for one in (None, config)
    )
    assert all(close(doubles(stepped)[name], doubles(plain)[name]) for name in state)


@each
@either
def test_resumed_run_goes_on_bit_for_bit(rule: Rule, config: ServerOptimizerConfig, tmp_path: Path) -> None:
    def play(strategy: FlowerStrategy, state: Tensors, first: int, last: int) -> Tensors:
        for server_round in range(first, last + 1):
            state = strategy.combine(server_round, state, iter(updates(rule, server_round, state))).state
        return state

    one = FlowerStrategy(rule, server_optimizer=config)
    one.begin(start(rule))
    half = play(one, start(rule), 1, 2)
    assert one.server_optimizer is not None
    save(tmp_path, Checkpoint(2, half, one.versions, 0, {}, one.server_optimizer.moments), 1)
    read = newest(tmp_path, print)
    assert read is not None
    other = FlowerStrategy(rule, server_optimizer=config)
    other.begin(read.state, read.versions, read.moments)
    again = {name: read.state[name] for name in half}  # in the order in which the noise of the updates is drawn
    straight, resumed = play(one, half, 3, 4), play(other, again, 3, 4)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    forgetful = FlowerStrategy(rule, server_optimizer=config)
    forgetful.begin(read.state, read.versions)
    lost = play(forgetful, again, 3, 4)
    assert any(not torch.equal(straight[name], lost[name]) for name in straight)


def test_flexlora_takes_none() -> None:
    with pytest.raises(ValueError, match=r"FlexLoRARule: .*it takes no server_optimizer"):
        strategies.FlexLoRA(server_optimizer=MOMENTUM)
    with pytest.raises(ValueError, match="takes no server_optimizer"):
        make_strategy(FlexLoRAConfig(), seed=0, server_optimizer=ADAM)
