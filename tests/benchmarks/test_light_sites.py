"""Light sites answer under every strategy so that the server's checks take their updates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

import strategies
from benchmarks.scale.run import STRATEGIES
from benchmarks.scale.sites import Answers
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from deploy.sandbox.tiny import make_federation, make_model
from server.loop.rounds import RoundLoop
from server.loop.server_model import ServerModel
from server.run.folder import RunFolder
from strategies.flower.named import make_strategy
from tests.harness.fake_sites import Grid, settings_of
from tests.harness.results import events


class Light:
    def __init__(self, answers: Answers, number: int) -> None:
        self.answers, self.number = answers, number

    def reply(self, message: Message) -> Message:
        return self.answers(self.number, message)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("light") / "model")


def test_every_strategy_is_there() -> None:
    assert {section["name"] for section in STRATEGIES.values()} == set(strategies.STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_are_admitted_round_after_round(tmp_path: Path, model: Path, name: str) -> None:
    strategy, rounds = {**STRATEGIES[name], "rank": 8}, 2
    (tmp_path / "model").symlink_to(model)
    sizes, without = {"site-a": 4, "site-b": 4}, {"server": None, "generate": 0}
    file = make_federation(tmp_path, sizes, strategy=strategy, rounds=rounds, evaluation=without)
    config = resolved(load(file, FederationConfig), file)
    server: Any = ServerModel(config, file)
    start = server.initial_state()
    answers = Answers(config, start, server.base_digest, server.tokenizer_digest)
    sites: Any = {number: Light(answers, number) for number in (1, 2)}
    grid: Any = Grid(sites)
    folder = RunFolder.create(tmp_path / "run", config)
    made = make_strategy(
        config.strategy, seed=config.training.seed, aggregation=config.aggregation, server_optimizer=None
    )
    try:
        end = RoundLoop(grid, config, settings_of(config), made, server, folder).run(start)
    finally:
        folder.close()
    assert len(events(tmp_path / "run", "reply")) == 2 * rounds
    assert not events(tmp_path / "run", "update_refused") + events(tmp_path / "run", "client_failed")
    assert any(not torch.equal(end[tensor], start[tensor]) for tensor in start)
