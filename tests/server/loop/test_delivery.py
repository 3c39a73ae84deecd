"""The delivery: who is asked, in which form, who is waited for, and what is told of those that have no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import PolicyError, StaleStateError
from common.model.card import BaseFacts, Card, read_told
from common.model.finished import About, Use
from common.protocol import wire
from common.protocol.digest import tensors_digest
from common.protocol.messages import DeliverReply, DeliverRequest, Failure
from server.buffered.loop import BufferedLoop
from server.loop import delivery
from server.loop.rounds import RoundLoop
from server.run.folder import RunFolder, read_lines, read_run
from server.run.outcome import Outcome
from strategies.flower.named import make_strategy
from tests.harness import fake_sites
from tests.harness.fake_sites import Clock, Grid, Site, base, node_unavailable, settings_of

BASE = BaseFacts(name="m", digest="a" * 64, tokenizer_digest="b" * 64, dtype="float32")
SETTINGS: dict[str, Any] = {
    "name": "x",
    "model": {"path": "m"},
    "strategy": {"name": "fedftg", "rank": 2},
    "rounds": 2,
    "training": {"learning_rate": 70.0, "local_steps": 1},
    "delivery": {"deadline": 100.0},
}


class Keeper(Site):
    """A site that keeps the model, and notes in which forms it was sent."""

    def __init__(self, number: int, keeps: str = "end") -> None:
        super().__init__(number)
        self.says = {"keeps-model": keeps}
        self.forms: list[str] = []
        self.answer: Callable[[DeliverRequest], Failure | DeliverReply | None] = lambda asked: None
        self.lost = 0  # how many of the next messages are lost

    def reply(self, message: Message) -> Message:
        if message.metadata.message_type != delivery.DELIVER:
            return super().reply(message)
        if self.lost:
            self.lost -= 1
            return node_unavailable(message)
        asked = DeliverRequest.read(message.content)
        self.forms.append("whole" if asked.arrays else "steps" if asked.steps else "name")
        told = self.answer(asked) or DeliverReply(files=read_told(asked.about, About).card.trained_digest)
        if isinstance(told, Failure):
            return Message(Error(told.code, told.reason), reply_to=message)
        return Message(told.to_record(), reply_to=message)


class ServerModel(fake_sites.ServerModel):
    """Writes a folder that holds the digest alone."""

    use = Use(seed=0, max_length=8, max_new_tokens=1, batch_size=1)

    def card(self, state: dict[str, torch.Tensor], outcome: Outcome) -> Card:
        config = parse(SETTINGS, FederationConfig, "x")
        digest = tensors_digest(state)
        facts = {"federation": "x", "task": config.task, "strategy": config.strategy, "form": "model", "rounds": 2}
        return Card(base=BASE, trained_digest=digest, **facts, **vars(outcome))  # type: ignore[arg-type]

    def export(self, state: dict[str, torch.Tensor], folder: Path, card: Card) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "digest").write_text(card.trained_digest)


def deliver(
    tmp_path: Path,
    sites: list[Site],
    *,
    away: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    grid: Any = None,
    **changes: Any,
) -> RunFolder:
    """A run, and its delivery.

    Args:
        tmp_path: where.
        sites: the sites.
        away: sites that are gone after the last evaluation, for so many seconds.
        monkeypatch: puts a clock in the place of time.
        grid: how messages come and go; None: at once.
        changes: of ``SETTINGS``.
    """
    clock = Clock(monkeypatch)
    monkeypatch.setattr(delivery, "time", clock)
    monkeypatch.setattr(delivery, "files_digest", lambda folder: (folder / "digest").read_text())
    config = parse({**SETTINGS, "cohort": {"min_clients": len(sites)}, **changes}, FederationConfig, "x")
    folder = RunFolder.create(tmp_path / "run", config)
    grid = grid or Grid(dict(enumerate(sites, start=1)))
    strategy = make_strategy(config.strategy, seed=0, aggregation=config.aggregation, server_optimizer=None)
    server_model: Any = ServerModel()
    try:
        make_loop = BufferedLoop if config.cohort.buffered else RoundLoop
        loop = make_loop(grid, config, settings_of(config), strategy, server_model, folder)
        state = loop.run(base())
        begun = clock.now

        def there() -> list[int]:
            return [n for n in grid.sites if clock.now >= begun + away.get(n, 0.0)]

        grid.get_node_ids = there
        loop.deliver(state)
    finally:
        folder.close()
    return folder


def told(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder.path / "events.jsonl") if event["event"] == kind]


def test_site_that_is_away_is_waited_for_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites: list[Site] = [Keeper(1), Keeper(2), Keeper(3), Site(4)]
    folder = deliver(tmp_path, sites, away={2: 60.0, 3: 1000.0}, monkeypatch=monkeypatch)
    assert [e["client"] for e in told(folder, "model_delivered")] == ["site-1", "site-2"]
    (missing,) = told(folder, "model_missing")
    assert missing["reason"] == "site-3: it is away; `delivery.deadline` is 100 seconds"
    run = read_run(folder.path)
    assert run["undelivered"] == ["site-3"]
    assert run["models"]["model"]["round"] == run["last_round"] == 2
    assert told(folder, "delivering")[0]["clients"] == ["site-1", "site-2", "site-3"]  # site-4 keeps none


def test_site_that_lacks_the_model_is_sent_more_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = Keeper(1), Keeper(2), Keeper(3)
    state: dict[str, torch.Tensor] = {}

    def lacks(asked: DeliverRequest) -> Failure | None:
        if asked.arrays:
            state.update(wire.decode(asked.arrays))
        return None if asked.num_bytes else Failure(StaleStateError.code, "not here")

    def computes_other_bits(asked: DeliverRequest) -> Failure | None:
        return None if asked.arrays and lacks(asked) is None else Failure(StaleStateError.code, "other bits")

    one.answer, two.answer = lacks, computes_other_bits
    three.answer = lambda asked: Failure(StaleStateError.code, "never")
    folder = deliver(tmp_path, [one, two, three], away={}, monkeypatch=monkeypatch)
    assert (one.forms, two.forms) == (["name", "steps"], ["name", "steps", "whole"])
    assert three.forms == ["name", "steps", "whole"]
    assert tensors_digest(state) == read_run(folder.path)["models"]["model"]["trained_digest"]
    assert [e["client"] for e in told(folder, "model_delivered")] == ["site-1", "site-2"]
    assert [e["reason"] for e in told(folder, "model_missing")] == ["site-3: never"]


def test_refusals_and_lost_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = Keeper(1), Keeper(2), Keeper(3)
    one.answer = lambda asked: Failure(PolicyError.code, "this site's policy: `federations` allows y; this is x")
    two.answer = lambda asked: DeliverReply(reason="no room: it takes 5 GB")
    three.lost = 2
    three.answer = lambda asked: DeliverReply(files="0" * 64)
    folder = deliver(tmp_path, [one, two, three], away={}, monkeypatch=monkeypatch)
    assert [e["reason"] for e in told(folder, "model_missing")] == [
        "site-1: this site's policy: `federations` allows y; this is x",
        "site-2: no room: it takes 5 GB",
    ]
    assert [(e["client"], e["same"]) for e in told(folder, "model_delivered")] == [("site-3", False)]
    assert one.forms == two.forms == three.forms == ["name"]
