"""A round that is over when the first updates are in; slow sites go on with the state that they have (FedBuff).

Source: arXiv 2106.06639; decision 040. A site has one open request at a time. When its update comes, the update counts
for the round that is open then, by its age (``strategies.combine.stale``), and the site is given work again with the
next round. The server's own note of the request tells which round a site started in, never the site.
"""

import time
from collections.abc import Iterator

from flwr.app import Message
from flwr.common.constant import ErrorCode

from common.errors import RefusedUpdate, WireError
from common.protocol.messages import Failure, TrainReply
from common.text import SENTENCE, one_line
from server.buffered.earlier import EarlierStates
from server.loop.inflight import POLL_SECONDS, Sent
from server.loop.recorder import record_evaluation
from server.loop.round import Parts, Round
from strategies.admission.bounds import UpdateSize
from strategies.rule import RoundResult, Tensors, Update

GROUP = "train"  # the group of all requests: a request outlives the round that it was sent in


class BufferedRound(Round):
    """A round of ``cohort.mode`` buffered.

    Args:
        parts: see ``Round``.
        number: see ``Round``.
        state: the state that the round's updates are added to.
        sent: bytes of the open requests, by node; all rounds share it.
        earlier: the states of earlier rounds that sites still train from; all rounds share them.
        evaluate: see ``Round``.
        deadline: see ``Round``.
    """

    def __init__(
        self,
        parts: Parts,
        number: int,
        state: Tensors,
        sent: dict[int, int],
        earlier: EarlierStates,
        *,
        evaluate: bool,
        deadline: float,
    ) -> None:
        super().__init__(parts, number, state, evaluate=evaluate, deadline=deadline)
        assert self._cohort.size is not None  # noqa: S101 - the federation file has it in this mode
        assert self._cohort.max_age is not None  # noqa: S101 - likewise
        self._size, self._max_age = self._cohort.size, self._cohort.max_age
        self._group, self._sent, self._earlier = GROUP, sent, earlier

    def begin(self, cohort: list[int]) -> None:
        """Send work to the nodes of ``cohort``, which have none; the weights of all sites are limited by one median."""
        self._heaviest = self._limit(self._parts.clients.connected())
        self._ask(cohort)

    def combine(self) -> RoundResult:
        """See ``Round.combine``; remembers what the sites that go on have started from."""
        outcome, strategy = super().combine(), self._parts.strategy
        strategy.keep_open(self._parts.in_flight.waiting(GROUP), self._earlier.store)
        self._earlier.keep({start.server_round for start in strategy.earlier.values()})
        return outcome

    def _ask(self, nodes: list[int]) -> None:
        super()._ask(nodes)
        self._sent |= {node_id: self.recorder.sent[node_id] for node_id in nodes}

    def _updates(self) -> Iterator[tuple[Update, UpdateSize]]:
        """The first ``size`` updates, as they arrive; fewer when no site is left that could send one, or no time."""
        in_flight, since, going_on = self._parts.in_flight, time.monotonic(), True
        while going_on and not self._full():
            for sent, reply in in_flight.arrived(GROUP):
                self.recorder.elsewhere += time.monotonic() - since
                found = self._take(sent, reply)
                del reply
                if found is not None:
                    yield found
                    del found
                since = time.monotonic()
                if self._full():
                    break  # the others count for the next round
            else:
                going_on = self._goes_on()
        self.recorder.elsewhere += time.monotonic() - since
        for name, failure in self._lost.items():
            self._fail(name, failure)
        self._lost.clear()

    def _takes_others(self) -> bool:
        return not self._full()

    def _full(self) -> bool:
        return len(self.recorder.admitted) >= self._size

    def _goes_on(self) -> bool:
        """Give work to the sites that lost theirs, and wait for a moment; returns whether anything can still come."""
        in_flight, deadline = self._parts.in_flight, self._cohort.round_deadline
        for sent in in_flight.open(GROUP):
            if time.time() > sent.at + deadline:
                in_flight.forget(GROUP, sent.node_id)
                silent = Failure(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"no answer within {deadline:.4g} seconds")
                self._fail(self._parts.strategy.client(sent.node_id).name, silent)
                if sent.node_id in self._parts.clients.connected():
                    self._ask_again(sent.node_id)
        waits = self._look_after_lost()
        self._ask_newcomers()
        waits = waits or bool(in_flight.waiting(GROUP))
        if not waits or time.monotonic() > self._asked + deadline:
            return False
        time.sleep(POLL_SECONDS)
        return True

    def _ask_newcomers(self) -> None:
        """Give work to the sites that have joined, or come back, since the round began."""
        strategy, clients = self._parts.strategy, self._parts.clients
        clients.register_with(strategy)
        busy = {strategy.client(node_id).name for node_id in self._parts.in_flight.waiting(GROUP)}
        heard = {*self.recorder.admitted, *self.recorder.problems, *self._lost}
        for node_id in clients.connected():
            if strategy.client(node_id).name not in busy | heard:
                self._ask_again(node_id)

    def _ask_again(self, node_id: int) -> None:
        name = self._parts.strategy.client(node_id).name
        self._parts.folder.event("work_given", round=self._number, client=name)
        self._ask([node_id])

    def _take(self, sent: Sent, reply: Message) -> tuple[Update, UpdateSize] | None:
        """See ``Round._take``; an update that is too old is dropped, and its site is given work at once."""
        age = self._number - self._parts.strategy.given(sent.node_id).server_round
        if age <= self._max_age or reply.has_error():
            return super()._take(sent, reply)
        client = self._parts.strategy.client(sent.node_id)
        reason = (
            f"{client.name}: {age} rounds were finished since it started; allowed by `cohort.max_age`: {self._max_age}"
        )
        try:
            self._parts.strategy.acknowledge(TrainReply.read(reply.content), sent.node_id)
        except (WireError, RefusedUpdate) as wrong:
            client.forget()
            reason = f"{reason}; {wrong}"
        self._parts.folder.event(
            "update_dropped", round=self._number, client=client.name, age=age, reason=one_line(reason, SENTENCE)
        )
        self._ask_again(sent.node_id)
        return None

    def _admit(self, told: TrainReply, node_id: int) -> tuple[Update, UpdateSize]:
        """The update in a reply, added to this round's state; its size is that of its own change."""
        update, how_far = super()._admit(told, node_id)
        return self._parts.strategy.carried_over(update, node_id, self._number, self._state), how_far

    def _record(self, sent: Sent, told: TrainReply, update: Update) -> None:
        self.recorder.update(sent, told, update, self._heaviest, self._sent[sent.node_id])
        after = self._number - update.age - 1
        if after % self._parts.config.evaluation.every == 0:
            record_evaluation(self._parts.folder, after, update.client, told.scores, age=update.age)
