"""One round: send the work to the sites, check each reply as it arrives, aggregate the admitted updates."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode

from common.config.federation import FederationConfig
from common.config.section import SERVER
from common.errors import AggregationError, FederationError, RefusedUpdate, StaleStateError, WireError, kind_of
from common.protocol.fields import Content
from common.protocol.messages import Failure, HelloRequest, TrainReply, TrainRequest
from server.loop.best import BestRound, Told
from server.loop.clients import Clients
from server.loop.inflight import LOST, SUPERLINKS, InFlight, Sent, failure_in
from server.loop.pending_updates import PendingUpdates
from server.loop.recorder import RoundRecorder, record_evaluation
from server.run.folder import RunFolder
from server.run.quarantine import Quarantine
from strategies.admission.bounds import UpdateSize, change_norms, check_possible, heaviest, update_size
from strategies.flower.messages import RuleMessages
from strategies.rule import RoundResult, Tensors, Update

log = logging.getLogger(__name__)
#: Error codes after which a client is sent the round's work once more: stale state, a crash (decisions 003, 011).
_ONCE_MORE = LOST - {ErrorCode.NODE_UNAVAILABLE} | {StaleStateError.code}
_MOST_TIMES = 10  # a round's work is sent to a site at most so many times, however often the site reconnects
_TIMES = {ErrorCode.NODE_UNAVAILABLE: _MOST_TIMES, ErrorCode.MESSAGE_UNAVAILABLE: 4}  # the second: its answer is lost


@dataclass(frozen=True)
class Parts:
    """The parts of the server that all rounds share; see ``RoundLoop``."""

    config: FederationConfig
    settings: HelloRequest
    strategy: RuleMessages
    in_flight: InFlight
    clients: Clients
    quarantine: Quarantine
    folder: RunFolder
    best: BestRound
    told: Callable[[int, int, Tensors], Told]  # tells a site about the model that it keeps
    run: int = 0  # Flower's number of the run
    capped: set[str] = field(default_factory=set)  # sites of which it was told that they weigh less than they declare

    @property
    def lifetime(self) -> float:
        """Time to live of messages and replies, seconds: twice the deadline, to tell late replies from missing ones."""
        return 2 * self.config.cohort.round_deadline

    def message(self, request: Content, node_id: int, kind: str, server_round: int) -> Message:
        """Make the message with a request to a node; its time to live is ``lifetime``."""
        return Message(request.to_record(), node_id, kind, ttl=self.lifetime, group_id=str(server_round))


class Round:
    """The current round.

    Args:
        parts: the parts of the server that all rounds share.
        number: the round's number, from 1.
        state: the state that the sites start from.
        evaluate: whether the sites evaluate the state before they train (decision 002).
        deadline: seconds after which the round closes if it has ``min_clients`` updates.

    Attributes:
        kind: Flower's type of the messages with the round's work.
        reply: the class of the replies to them.
    """

    kind: ClassVar[str] = MessageType.TRAIN
    reply: ClassVar[type[TrainReply]] = TrainReply

    def __init__(self, parts: Parts, number: int, state: Tensors, *, evaluate: bool, deadline: float) -> None:
        self.recorder = RoundRecorder(number, parts.folder)
        self._parts, self._number, self._state, self._evaluate = parts, number, state, evaluate
        self._group = f"train/{number}"
        self._asked = time.monotonic()
        self._deadline, self._cohort = deadline, parts.config.cohort
        self._lost: dict[str, Failure] = {}  # sites whose connection or worker died, with the round's work
        self._again: set[str] = set()
        self._given = Counter[str]()  # how often each site was given the work
        self._heaviest = math.inf  # largest weight of a site in the mean, in rows

    def begin(self, cohort: list[int]) -> None:
        """Send the round's work to the nodes of its cohort."""
        self._heaviest = self._limit(cohort)
        self._ask(cohort)

    def _limit(self, cohort: list[int]) -> float:
        """The largest weight of a site in the mean, in rows."""
        ratio, rows = self._parts.config.admission.rows_ratio, [self._rows(node_id) for node_id in cohort]
        return math.inf if ratio is None else heaviest(rows, ratio)

    def _rows(self, node_id: int) -> int:
        """Number of training rows that the node's site has declared."""
        return self._parts.clients.hellos[node_id].train_rows

    def _ask(self, nodes: list[int]) -> None:
        """Send the round's work to the given nodes."""
        parts, messages = self._parts, []
        for node_id, state in parts.strategy.train_states(self._number, self._state, nodes):
            told = parts.told(node_id, self._number - 1, self._state)
            request = self._request(node_id, TrainRequest.of(parts.settings, state, *told, evaluate=self._evaluate))
            messages.append(parts.message(request, node_id, self.kind, self._number))
            self._given[parts.strategy.client(node_id).name] += 1
            self.recorder.asked(node_id, request.num_bytes)
        parts.in_flight.push(messages, self._group)

    def _request(self, node_id: int, request: TrainRequest) -> TrainRequest:
        """The request as it is sent to a node."""
        del node_id
        return request

    def combine(self) -> RoundResult:
        """Wait for the replies and aggregate the admitted updates.

        Raises:
            FederationError: there are too few admitted updates, or they cannot be aggregated.
        """
        try:
            outcome = self._parts.strategy.combine(self._number, self._state, self._counted())
        except AggregationError as error:
            causes = {**self.recorder.kinds, SERVER: kind_of(error)}
            raise FederationError(f"round {self._number}: {error}{self._reasons()}", causes) from None
        valid, needed = len(self.recorder.admitted), self._cohort.min_clients
        if valid < needed:
            reason = f"round {self._number}: {valid} valid updates, {needed} needed{self._reasons()}"
            raise FederationError(reason, self.recorder.kinds)
        self.recorder.close(self._diagnostics(outcome))
        return outcome

    def _diagnostics(self, outcome: RoundResult) -> dict[str, float]:
        return outcome.diagnostics

    def _counted(self) -> Iterator[Update]:
        """The admitted updates: without ``norm_ratio`` as they arrive, else those within the cohort bound, by name."""
        ratio, quarantine = self._parts.config.admission.norm_ratio, self._parts.quarantine
        if ratio is None:
            for update, _ in self._updates():
                quarantine.note(update.client, refused=False)
                yield self._weighed(update)
                del update
            return
        with PendingUpdates(self._parts.folder.path / "incoming") as pending:
            going_on = True
            while going_on:
                for update, how_far in self._updates():
                    pending.put(update, how_far)
                    del update
                refused = pending.refuse_beyond(ratio)
                for client, reason in refused.items():
                    self._refuse(client, reason, RefusedUpdate.__name__)
                going_on = bool(refused) and self._takes_others()
            for update in pending.updates():
                quarantine.note(update.client, refused=False)
                yield self._weighed(update)
                del update

    def _takes_others(self) -> bool:
        """Whether other updates may come in the place of those that were refused when all had come."""
        return False

    def _weighed(self, update: Update) -> Update:
        """The update with its weight in the average; that it is less than was declared is told once a run."""
        site, rows = update.client, update.num_examples
        if rows <= self._heaviest:
            return update
        if site not in self._parts.capped:
            self._parts.capped.add(site)
            times = f"{self._parts.config.admission.rows_ratio:g} times the median of its round's sites"
            reason = f"{site}: it declares {rows} rows and weighs as {self._heaviest:g}, {times}"
            self._parts.folder.event("weight_capped", client=site, reason=reason)
        return replace(update, num_examples=int(self._heaviest))

    def _updates(self) -> Iterator[tuple[Update, UpdateSize]]:
        """Well-formed updates with their sizes, as they arrive; rejected, failed and missing replies are noted."""
        in_flight, since = self._parts.in_flight, time.monotonic()
        for sent, reply in in_flight.replies(self._group, self._closes_at, self._look_after_lost):
            self.recorder.elsewhere += time.monotonic() - since
            found = self._take(sent, reply)
            del reply
            if found is not None:
                yield found
                del found
            since = time.monotonic()
        self.recorder.elsewhere += time.monotonic() - since
        for node_id in in_flight.forget(self._group):
            name = self._parts.strategy.client(node_id).name
            seconds = self._closes_at() - self._asked
            self._lost[name] = Failure(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"no answer within {seconds:.4g} seconds")
        for name, failure in self._lost.items():
            self._fail(name, failure)

    def _take(self, sent: Sent, reply: Message) -> tuple[Update, UpdateSize] | None:
        """The update in a reply, and its size; None when the reply holds an error or is rejected."""
        client = self._parts.strategy.client(sent.node_id)
        name, failure = client.name, failure_in(reply)
        if failure is not None:
            client.forget()
            if failure.code in _ONCE_MORE and name not in self._again:
                self._again.add(name)
                self._lost[name] = failure
            elif self._given[name] < _TIMES.get(failure.code, 0):
                self._lost[name] = failure
            else:
                self._fail(name, failure)
            return None
        try:
            told = self.reply.read(reply.content)
            update, how_far = self._admit(told, sent.node_id)
        except WireError as unreadable:
            client.forget()
            self._refuse(name, f"{name}: {unreadable}", kind_of(unreadable))
        except RefusedUpdate as refusal:
            self._refuse(name, str(refusal), kind_of(refusal))
        except Exception as error:  # an unforeseen content of a reply ends the round for its site, not for all
            log.exception("round %d: reading the reply of %s failed", self._number, name)
            reason = f"{name}: its reply cannot be used ({kind_of(error)}; the server's log says where)"
            self._refuse(name, reason, kind_of(error))
        else:
            self._record(sent, told, update)
            return update, how_far
        return None

    def _record(self, sent: Sent, told: TrainReply, update: Update) -> None:
        """Note an admitted update, and its site's scores if they were asked for."""
        self.recorder.update(sent, told, update, self._heaviest)
        if self._evaluate:
            record_evaluation(self._parts.folder, self._number - 1, update.client, told.scores)

    def _admit(self, told: TrainReply, node_id: int) -> tuple[Update, UpdateSize]:
        """Check the update in a reply; return it with its size.

        Raises:
            RefusedUpdate: the update is rejected; the text has the reason.
        """
        config, update = self._parts.config, self._parts.strategy.admit(told, node_id)
        privacy, rows = self._parts.clients.hellos[node_id].privacy, self._rows(node_id)
        if update.num_examples != rows:
            raise RefusedUpdate(f"{update.client}: num-examples is {update.num_examples}, it declared {rows} rows")
        base = self._parts.strategy.base_of(node_id)
        norms = change_norms(update, base)
        check_possible(update, norms, base, config.training, config.strategy, privacy)
        update = replace(update, norms=norms)
        return update, update_size(norms, rows, base, config.training, config.strategy, privacy)

    def _look_after_lost(self) -> bool:
        """Resend lost work to sites that are back; returns whether to wait for the sites that are not."""
        in_flight, clients, strategy = self._parts.in_flight, self._parts.clients, self._parts.strategy
        clients.poll_hellos()  # a site that joins now takes part from the next round on
        returned = clients.returned(self._group)
        for node_id in in_flight.waiting(self._group):
            name = strategy.client(node_id).name
            if node_id in returned or clients.node_of(name) not in (node_id, None):  # it reconnected, or as a new node
                in_flight.forget(self._group, node_id)
                self._lost[name] = Failure(ErrorCode.NODE_UNAVAILABLE, "its connection was lost")
        for name in list(self._lost):
            back = clients.node_of(name)
            if self._given[name] == _MOST_TIMES:
                self._fail(name, self._lost.pop(name))
            elif back is not None:
                del self._lost[name]
                clients.register_with(strategy)
                self._ask([back])
        return bool(self._lost) and len(self.recorder.admitted) < self._cohort.min_clients

    def _closes_at(self) -> float:
        """The time at which the round closes, on the clock of ``time.monotonic()``."""
        enough = len(self.recorder.admitted) >= self._cohort.min_clients
        return self._asked + (self._deadline if enough else self._cohort.round_deadline)

    def _fail(self, site: str, failure: Failure, *, took_part: bool = False) -> None:
        counted = failure.code not in SUPERLINKS  # else the site has not answered, which may be its link's fault
        reason = f"{site}: {failure.reason}"
        self.recorder.problem(site, "client_failed", reason, failure.kind, took_part=took_part, counted=counted)
        if counted:
            self._count(site)

    def _refuse(self, site: str, reason: str, kind: str) -> None:
        self.recorder.problem(site, "update_refused", reason, kind)
        self._count(site)

    def _count(self, site: str) -> None:
        """One more refusal in a row; one too many leaves the site out."""
        quarantine = self._parts.quarantine
        before = quarantine.excluded()
        quarantine.note(site, refused=True)
        for left_out in quarantine.excluded().keys() - before.keys():
            self._parts.folder.event("client_excluded", client=left_out, reason=quarantine.excluded()[left_out])

    def _reasons(self) -> str:
        return "".join(f"; {reason}" for reason in self.recorder.problems.values())
