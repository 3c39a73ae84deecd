"""Sites without processes: a grid that delivers at once, and sites that follow FedFTG's steps as true ones do."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from client.held_weights import Weights
from common.config.federation import FederationConfig, settings_for_sites
from common.config.load import parse
from common.errors import StaleStateError
from common.protocol import wire
from common.protocol.factors import Factors, pack
from common.protocol.messages import (
    EvaluateReply,
    EvaluateRequest,
    Failure,
    HelloRequest,
    State,
    TrainReply,
    TrainRequest,
)
from common.protocol.versions import Step
from server.buffered.loop import BufferedLoop
from server.loop.checkpoint import newest
from server.loop.rounds import RoundLoop
from server.run.folder import RunFolder
from strategies.fedftg import FedFTGRule
from strategies.flower.named import make_strategy

NAME, SHAPE = "model.layers.0.up.weight", (60, 40)
RULE = FedFTGRule()


def node_unavailable(message: Message) -> Message:
    """What a SuperLink answers in place of a node that is gone."""
    return create_message_error_unavailable_res_message(message.metadata, "node_unavail")


def base() -> dict[str, torch.Tensor]:
    return {NAME: torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))}


class Site:
    """A site that follows the steps, as a true one does, and notes what it is sent."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weights = Weights(base(), RULE.exchange)
        self.sent: list[tuple[int, list[int]]] = []  # (round, rounds of the steps that came)
        self.says: dict[str, int | str] = {}  # in its hello, instead of the truth
        self.privacy: dict[str, float] = {}
        self.before_reply: Callable[[Message], Message | None] = lambda message: None

    def forget(self) -> None:
        self.weights = Weights(base(), RULE.exchange)

    def reply(self, message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return Message(self._hello(), reply_to=message)
        asked = (TrainRequest if kind == MessageType.TRAIN else EvaluateRequest).read(message.content)
        self.sent.append((asked.server_round, sorted(asked.steps)))
        if (instead := self.before_reply(message)) is not None:
            return instead
        try:
            self._take(asked)
        except StaleStateError as error:
            return Message(Failure.of(error).to_error(), reply_to=message)
        if kind == MessageType.EVALUATE:
            return Message(EvaluateReply(scores={"loss": 1.0}).to_record(), reply_to=message)
        return Message(self._train(asked.server_round).to_record(), reply_to=message)

    def _train(self, server_round: int) -> TrainReply:
        g = torch.Generator().manual_seed(100 * self.number + server_round)
        factors = Factors(1.0, [(torch.randn(60, 2, generator=g), torch.randn(2, 40, generator=g))])
        return TrainReply(
            server_round=server_round,
            arrays=wire.encode(pack(NAME, factors, self.weights.tensors[NAME], RULE.exchange(1))),
            num_examples=self.number,
            training={"loss": 1.0},
            version=self.weights.version,
        )

    def _take(self, state: State) -> None:
        if state.since is None:
            self.weights.replace(wire.decode(state.arrays), str(state.version))
            return
        if state.since == self.weights.first and self.weights.version not in (state.since, state.version):
            self.forget()
        steps = [Step(number, wire.decode(record)) for number, record in state.steps.items()]
        self.weights.follow(steps, state.since, str(state.version))

    def _hello(self) -> RecordDict:
        facts = {"site": f"site-{self.number}", "train_rows": self.number, "held_out_rows": 1, "device": "cpu"}
        facts |= {"rank": 2, "base_digest": "base", "tokenizer_digest": "tokenizer", "version": "1", **self.says}
        told = RecordDict({"config": ConfigRecord(facts), "metrics": MetricRecord()})  # by hand, for what is wrong
        if self.privacy:
            told["privacy"] = ConfigRecord({**self.privacy})
        return told


LORA = {"name": "flexlora", "rank": 4, "lora_alpha": 16.0}
A, B = ".lora_A.weight", ".lora_B.weight"
LAYERS = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def factors(*ranks: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A and B of every layer, each of its rank."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, rank in zip(LAYERS, ranks, strict=True):
        tensors[layer + A] = torch.randn(rank, 12, generator=g)
        tensors[layer + B] = torch.randn(9, rank, generator=g)
    return tensors


class LoraSite(Site):
    """A site that answers with factors; whatever it is sent, it moves by little.

    Args:
        number: of the site.
        ranks: of its layers.
        lora_alpha: of its replies; None: they tell none.
    """

    def __init__(self, number: int, ranks: tuple[int, int] = (4, 4), lora_alpha: float | None = None) -> None:
        super().__init__(number)
        self._ranks, self._alpha = ranks, lora_alpha

    def _train(self, server_round: int) -> TrainReply:
        return TrainReply(
            server_round=server_round,
            arrays=wire.encode(factors(*self._ranks, seed=self.number)),
            num_examples=self.number,
        )

    def reply(self, message: Message) -> Message:
        reply = super().reply(message)
        if self._alpha is not None and message.metadata.message_type == MessageType.TRAIN:
            told = {"num-examples": self.number, "lora-alpha": self._alpha}  # by hand, for what is wrong
            reply.content["metrics"] = MetricRecord(told)
        return reply

    def _take(self, state: State) -> None:
        pass


#: How often a reply of this site to this message is not there yet when it is asked for.
Late = Callable[[int, Message], int]


def never_late(number: int, message: Message) -> int:
    return 0


class Grid:
    """Delivers at once, or after it was asked some times."""

    def __init__(self, sites: dict[int, Site], late: Late = never_late) -> None:
        self.sites, self._open, self._late = sites, dict[str, Message](), late
        self._asked: dict[str, int] = {}
        self._made: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(str(len(self._open)))
            self._open[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for i in message_ids:
            message = self._open[i]
            number = message.metadata.dst_node_id
            self._asked[i] = self._asked.get(i, 0) + 1
            if i not in self._made:
                self._made[i] = self.sites[number].reply(message)
            if self._asked[i] > self._late(number, message):
                replies.append(self._made[i])
        return replies


class Ordered(Grid):
    """Delivers the sites' updates in a given order, one after another; all else at once.

    Args:
        sites: by number.
        order: the numbers of the sites whose updates arrive; later ones are never there.
    """

    def __init__(self, sites: dict[int, Site], order: Sequence[int]) -> None:
        super().__init__(sites)
        self.order = list(order)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for i in message_ids:
            message = self._open[i]
            if message.metadata.message_type == MessageType.TRAIN:
                if self.order[:1] != [message.metadata.dst_node_id]:
                    continue
                del self.order[0]
            replies += super().pull_messages([i])
        return replies


class Clock:
    """The server's time: it passes while the server sleeps, and only then.

    Args:
        monkeypatch: puts it in the place of the round loop's ``time``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1e9
        for module in ("clients", "inflight", "recorder", "round", "rounds"):
            monkeypatch.setattr(f"server.loop.{module}.time", self)
        monkeypatch.setattr("server.buffered.round.time", self)

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class ServerModel:
    """The server has no evaluation set."""

    base_digest, tokenizer_digest = "base", "tokenizer"

    def evaluate(self, state: object) -> dict[str, float]:
        return {}


def settings_of(config: FederationConfig) -> HelloRequest:
    return HelloRequest(federation=settings_for_sites(config), signatures=None)


def run(
    tmp_path: Path,
    sites: Sequence[Site],
    rounds: int,
    *,
    resume: bool = False,
    late: Late = never_late,
    start: dict[str, torch.Tensor] | None = None,
    grid: Any = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """A whole run from ``start``, or ``base()``, on a grid of its own; ``changes`` are of the federation file."""
    settings = {
        "name": "x",
        "model": {"path": "m"},
        "strategy": {"name": "fedftg", "rank": 2},
        "rounds": rounds,
        "training": {"learning_rate": 70.0, "local_steps": 1},  # so that random changes are possible
        "cohort": {"min_clients": len(sites)},
        **changes,
    }
    config = parse(settings, FederationConfig, "x")
    checkpoint = None
    if resume:
        folder = RunFolder.reopen(tmp_path / "run", config)
        checkpoint = newest(folder.path, pytest.fail)
        folder.rewind(0 if checkpoint is None else checkpoint.metrics_bytes)
    else:
        folder = RunFolder.create(tmp_path / "run", config)
    grid = grid or Grid(dict(enumerate(sites, start=1)), late)
    server_model: Any = ServerModel()
    strategy = make_strategy(
        config.strategy, seed=0, aggregation=config.aggregation, server_optimizer=config.server_optimizer
    )
    make_loop = BufferedLoop if config.cohort.buffered else RoundLoop
    try:
        return make_loop(grid, config, settings_of(config), strategy, server_model, folder).run(
            start or base(), checkpoint
        )
    finally:
        folder.close()
