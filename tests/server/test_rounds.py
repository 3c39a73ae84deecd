"""The round loop against sites that answer at once: who is sent what, and who is asked again."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.weights import Weights
from common import wire
from common.config import FederationConfig, settings_for_sites
from common.errors import FederationError, StaleStateError
from common.factors import Factors, pack
from common.versions import Step
from common.yaml_file import parse
from server.checkpoint import newest
from server.rounds import RoundLoop
from server.run_folder import RunFolder, read_lines
from strategies.fedftg import FedFTGRule
from strategies.named import make_strategy

NAME, SHAPE = "model.layers.0.up.weight", (60, 40)
RULE = FedFTGRule()


@pytest.fixture(autouse=True)
def _within_a_run() -> Iterator[None]:
    """What the process of a ServerApp knows and Message asks for."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


def base() -> dict[str, torch.Tensor]:
    return {NAME: torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))}


class Site:
    """A site that follows the steps, as a true one does, and notes what it is sent."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weights = Weights(base(), RULE.exchange)
        self.sent: list[tuple[int, list[int]]] = []  # (round, rounds of the steps that came)
        self.before_reply: Callable[[Message], Message | None] = lambda message: None

    def forget(self) -> None:
        self.weights = Weights(base(), RULE.exchange)

    def reply(self, message: Message) -> Message:
        if message.metadata.message_type == MessageType.QUERY:
            return self._hello(message)
        config: Any = message.content["config"]
        steps = [
            Step(int(key[5:]), wire.decode(record))
            for key, record in sorted(message.content.items())
            if key.startswith("step-") and isinstance(record, ArrayRecord)
        ]
        self.sent.append((int(config["server-round"]), [step.server_round for step in steps]))
        if (instead := self.before_reply(message)) is not None:
            return instead
        try:
            self.weights.follow(steps, str(config["since"]), str(config["version"]))
        except StaleStateError as error:
            return Message(Error(error.code, str(error)), reply_to=message)
        if message.metadata.message_type == MessageType.EVALUATE:
            return Message(RecordDict({"metrics": MetricRecord({"evaluate.loss": 1.0})}), reply_to=message)
        g = torch.Generator().manual_seed(100 * self.number + int(config["server-round"]))
        factors = Factors(1.0, [(torch.randn(60, 2, generator=g), torch.randn(2, 40, generator=g))])
        arrays = wire.encode(pack(NAME, factors, self.weights.tensors[NAME], RULE.exchange(1)))
        metrics = MetricRecord({"num-examples": self.number, "train.loss": 1.0})
        told = ConfigRecord({"version": self.weights.version})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics, "config": told}), reply_to=message)

    def _hello(self, message: Message) -> Message:
        facts = {
            "site": f"site-{self.number}",
            "train_rows": self.number,
            "held_out_rows": 1,
            "device": "cpu",
            "rank": 2,
        }
        facts |= {"base_digest": "base", "tokenizer_digest": "tokenizer"}
        return Message(RecordDict({"config": ConfigRecord(facts)}), reply_to=message)


class Grid:
    """Delivers at once."""

    def __init__(self, sites: dict[int, Site]) -> None:
        self.sites, self._open = sites, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(str(len(self._open)))
            self._open[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.sites[self._open[i].metadata.dst_node_id].reply(self._open[i]) for i in message_ids]


class Evaluator:
    """The server has no evaluation set."""

    base_digest, tokenizer_digest = "base", "tokenizer"

    def evaluate(self, state: object) -> dict[str, float]:
        return {}


def run(tmp_path: Path, sites: list[Site], rounds: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
    settings = {
        "name": "x",
        "model": {"path": "m"},
        "strategy": {"name": "fedftg", "rank": 2},
        "rounds": rounds,
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "cohort": {"min_clients": len(sites)},
    }
    config = parse(settings, FederationConfig, "x")
    source, checkpoint = tmp_path / "federation.yaml", None
    if resume:
        folder = RunFolder.reopen(tmp_path / "run", config, source)
        checkpoint = newest(folder.path, pytest.fail)
        folder.rewind(0 if checkpoint is None else checkpoint.metrics_bytes)
    else:
        folder = RunFolder.create(tmp_path / "run", config, source)
    grid: Any = Grid(dict(enumerate(sites, start=1)))
    evaluator: Any = Evaluator()
    strategy = make_strategy(config.strategy, seed=0, aggregation=config.aggregation)
    return RoundLoop(grid, config, settings_for_sites(config), strategy, evaluator, folder).run(base(), checkpoint)


def test_sites_are_sent_what_they_lack_and_end_where_the_server_ends(tmp_path: Path) -> None:
    sites = [Site(1), Site(2)]
    final = run(tmp_path, sites, 3)
    for site in sites:
        assert site.sent == [(1, []), (2, [1]), (3, [2]), (3, [3])]  # the last is the evaluation
        assert torch.equal(site.weights.tensors[NAME], final[NAME])
    down = [r["bytes"]["down"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"]
    assert down[:2] == [0, 0]
    assert len(set(down[2:])) == 1


def test_site_that_has_lost_its_weights_is_sent_the_steps_from_the_base_model_in_the_same_round(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)

    def lose_once(message: Message) -> None:
        if [number for number, _ in two.sent] == [1, 2, 3]:  # just asked for round 3
            two.forget()

    two.before_reply = lose_once  # type: ignore[assignment]
    final = run(tmp_path, [one, two], 4)
    assert two.sent == [(1, []), (2, [1]), (3, [2]), (3, [1, 2]), (4, [3]), (4, [4])]
    assert torch.equal(two.weights.tensors[NAME], final[NAME])
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert not [e for e in events if e["event"] in ("client_failed", "update_refused")]
    assert final[NAME].equal(run(tmp_path / "again", [Site(1), Site(2)], 4)[NAME])  # as if nothing had happened


def test_site_that_fails_for_another_reason_is_not_asked_again(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)
    two.before_reply = lambda message: Message(Error(2, "out of memory"), reply_to=message)
    with pytest.raises(FederationError, match="round 1: 1 valid updates, 2 needed; site-2: out of memory"):
        run(tmp_path, [one, two], 1)
    assert two.sent == [(1, [])]


def test_site_that_is_stale_twice_is_left_out_with_its_reason(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)
    two.before_reply = lambda message: Message(Error(StaleStateError.code, "nothing is here"), reply_to=message)
    with pytest.raises(FederationError, match="site-2: nothing is here"):
        run(tmp_path, [one, two], 1)
    assert two.sent == [(1, []), (1, [])]


def numbers(tmp_path: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.mark.parametrize("stopped_in", [1, 2, 4])
def test_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path: Path, stopped_in: int) -> None:
    straight = run(tmp_path / "straight", [Site(1), Site(2)], 4)
    one, two = Site(1), Site(2)

    def fail(message: Message) -> Message | None:
        failing = two.sent[-1][0] == stopped_in and message.metadata.message_type == MessageType.TRAIN
        return Message(Error(2, "power cut"), reply_to=message) if failing else None

    two.before_reply = fail
    with pytest.raises(FederationError, match=f"round {stopped_in}: .*power cut"):
        run(tmp_path, [one, two], 4)
    assert [r["round"] for r in numbers(tmp_path) if r["phase"] == "aggregate"] == list(range(1, stopped_in))
    # The sites are new processes in a new run: they hold the base model, and nothing else.
    again = [Site(1), Site(2)]
    resumed = run(tmp_path, again, 4, resume=True)
    assert torch.equal(resumed[NAME], straight[NAME])
    assert again[0].sent[0] == (stopped_in, list(range(1, stopped_in)))
    by_round = sorted(numbers(tmp_path), key=str), sorted(numbers(tmp_path / "straight"), key=str)
    for records in by_round:  # bytes differ where a site had to be sent more
        for record in records:
            record.pop("bytes", None)
    assert by_round[0] == by_round[1]
