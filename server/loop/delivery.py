"""The delivery: after the last round every site that keeps the model writes it (decision 029).

The server asks by digest; a site writes what it holds, and is sent only what it lacks. A site that took part and is
away is waited for until the deadline. A run that ends before can be resumed for the delivery alone.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flwr.app import Message

from common.errors import StaleStateError, WireError
from common.metrics import SCORES
from common.model.card import Card
from common.model.finished import About, files_digest
from common.protocol.messages import DeliverReply, DeliverRequest, Failure
from common.text import SENTENCE, one_line
from server.loop.best import BestRound, Told
from server.loop.clients import Clients
from server.loop.inflight import LOST, POLL_SECONDS, Sent, failure_in
from server.loop.round import Parts
from server.loop.server_model import ServerModel
from server.run.folder import read_lines
from server.run.outcome import outcome_of
from strategies.rule import Tensors

DELIVER = "query.deliver"  # Flower's type of the message
_GROUP = "delivery"
_FORMS: tuple[Literal["name", "steps", "whole"], ...] = ("name", "steps", "whole")  # tried in this order
_LOST_TIMES = 5  # and asked again so often when its process dies, or its connection


@dataclass(frozen=True)
class Model:
    """A model that is delivered.

    Attributes:
        card: its card.
        state: its state.
        version: the state's version; None under a strategy without versions.
        files: digest of its files here.
    """

    card: Card
    state: Tensors
    version: str | None
    files: str


def telling(server_model: ServerModel, run_dir: Path, clients: Clients, best: BestRound) -> Callable[..., Told]:
    """A function of node, round and state: the facts that go with a round's work for the models that a site keeps."""
    about: dict[int, str] = {}

    def told(node_id: int, number: int, state: Tensors) -> Told:
        if clients.hellos[node_id].keeps != "every" or number == 0:
            return best.round, None
        if number not in about:
            about.clear()
            card = server_model.card(state, outcome_of(run_dir, number))
            about[number] = About(use=server_model.use, card=card).model_dump_json()
        return best.round, about[number]

    return told


class Delivery:
    """Writes the models here, and has them written at the sites.

    Args:
        parts: the parts of the server that all rounds share.
        server_model: the server's own model.
        number: the last round.
        state: the state after it.
    """

    def __init__(self, parts: Parts, server_model: ServerModel, number: int, state: Tensors) -> None:
        self._parts, self._server_model = parts, server_model
        versions, best = parts.strategy.versions, parts.best
        self._last = self._best = self._export("model", number, state, None if versions is None else versions.latest)
        if best.round is not None and best.round != number:
            self._best = self._export("best", best.round, *best.state(), by=SCORES[best.metric].in_text)
        self._sent = Counter[str]()  # how often each site was sent its model
        self._lost = Counter[str]()  # how often the message to each site was lost
        self._asked: dict[int, str] = {}  # sites with a message in flight, by node
        self._reasons: dict[str, str] = {}  # why a site has no model

    def _export(self, name: str, number: int, state: Tensors, version: str | None, by: str | None = None) -> Model:
        path = self._parts.folder.path
        card = self._server_model.card(state, outcome_of(path, number, by))
        self._server_model.export(state, path / name, card)
        model = Model(card, state, version, files_digest(path / name))
        told = {"round": number, "trained_digest": card.trained_digest, "files_digest": model.files}
        self._parts.folder.model_info({"models": {**self._parts.folder.fact("models", {}), name: told}})
        return model

    def run(self) -> None:
        """Deliver until every site has its model, or has said why not, or the deadline has passed."""
        folder, seconds = self._parts.folder, self._parts.config.delivery.deadline
        left, deadline = self._sites(), time.monotonic() + seconds
        if left:
            folder.event("delivering", clients=sorted(left), deadline=round(seconds))
        while left:
            self._ask(left)
            for sent, reply in self._parts.in_flight.arrived(_GROUP):
                site = self._asked.pop(sent.node_id)
                if self._take(sent, reply, site):
                    left.remove(site)
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS if left else 0)
        self._parts.in_flight.forget(_GROUP)
        for site in left:
            silent = "it has not answered" if site in self._asked.values() else "it is away"
            self._reasons.setdefault(site, f"{silent}; `delivery.deadline` is {seconds:g} seconds")
        for site in sorted(self._reasons):
            folder.event("model_missing", client=site, reason=one_line(f"{site}: {self._reasons[site]}", SENTENCE))
        folder.model_info({"undelivered": sorted(self._reasons)})

    def _sites(self) -> set[str]:
        """The sites that took part, keep the model, and do not have it yet."""
        events = read_lines(self._parts.folder.path / "events.jsonl")
        trained = {event["client"] for event in events if event["event"] == "reply"}
        keeps = self._parts.folder.fact("keeps", {})
        has = {event["client"] for event in events if event["event"] == "model_delivered"}
        return {site for site in trained - has - self._parts.quarantine.excluded().keys() if keeps.get(site)}

    def _ask(self, left: set[str]) -> None:
        """Send their model to the sites that are there and have no message in flight."""
        clients, in_flight = self._parts.clients, self._parts.in_flight
        clients.poll_hellos()
        clients.register_with(self._parts.strategy)
        returned = clients.returned(_GROUP)
        for node_id, site in list(self._asked.items()):
            if node_id in returned or clients.node_of(site) not in (node_id, None):  # it reconnected
                in_flight.forget(_GROUP, node_id)
                del self._asked[node_id]
        for site in sorted(left - {*self._asked.values()}):
            if (there := clients.node_of(site)) is not None:
                in_flight.push([self._message(there, site)], _GROUP)
                self._asked[there] = site

    def _model_for(self, node_id: int) -> Model:
        return self._best if self._parts.clients.hellos[node_id].keeps == "best" else self._last

    def _message(self, node_id: int, site: str) -> Message:
        """The request to write the model: first by its digest alone, then with the steps to it, then with all of it."""
        model = self._model_for(node_id)
        how = model.card.round, model.state, model.version, node_id
        state = self._parts.strategy.model_state(*how, _FORMS[self._sent[site]])
        about = About(use=self._server_model.use, card=model.card).model_dump_json()
        request = DeliverRequest(**vars(self._parts.settings), **vars(state), about=about)
        return self._parts.message(request, node_id, DELIVER, model.card.round)

    def _take(self, sent: Sent, reply: Message, site: str) -> bool:
        """Read a site's answer; returns whether it is the last one."""
        failure = failure_in(reply)
        try:
            told = DeliverReply.read(reply.content) if failure is None else DeliverReply()
        except WireError as unreadable:
            failure = Failure.of(unreadable)
        if failure is not None and failure.code == StaleStateError.code and self._sent[site] + 1 < len(_FORMS):
            self._sent[site] += 1
            return False
        if failure is not None and failure.code in LOST and self._lost[site] < _LOST_TIMES:
            self._lost[site] += 1
            return False
        if failure is not None or told.files is None:
            self._reasons[site] = told.reason or "it has written no model" if failure is None else failure.reason
            return True
        model = self._model_for(sent.node_id)
        number, same = model.card.round, told.files == model.files
        self._parts.folder.event("model_delivered", client=site, round=number, same=same)
        return True
