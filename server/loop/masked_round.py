"""A round whose updates the server never sees: it learns their sum (``common.masking``), and admits their mean.

The exchanges of keys and shares come before the training message, the list of survivors and its signatures after. A
site that drops out at any of them costs the round nothing but its update, as long as ``secure_aggregation.threshold``
sites are left. Below that, or with fewer updates than ``cohort.min_clients``, the round begins anew with fresh keys.
Keys and shares of the next round go ahead, with this one's answers, and are used when that has the same sites.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode

from common.config.section import settings_digest
from common.errors import AggregationError, FederationError, RefusedUpdate, WireError
from common.masking.parts import SumId
from common.protocol import wire
from common.protocol.digest import tensors_digest
from common.protocol.exchanges import (
    ACTION,
    KEYS,
    SHARES,
    SURVIVORS,
    UNMASK,
    ExchangeReply,
    ExchangeRequest,
    MaskedTrainReply,
    MaskedTrainRequest,
)
from common.protocol.messages import Declared, Failure, TrainReply, TrainRequest
from server.loop.inflight import failure_in
from server.loop.open_sum import Members, OpenSum
from server.loop.round import Parts, Round
from strategies.admission.bounds import UpdateSize, change_norms, check_possible, total
from strategies.combine.masked import MOST_NOISE, Vector, agreed_text, weight_of
from strategies.rule import RoundResult, Tensors, Update

_GRACE = 5.0  # seconds for further signatures and shares when there are enough of them


class MaskedRound(Round):
    """A round with masked sums.

    Args:
        parts: see ``Round``.
        number: see ``Round``.
        state: see ``Round``.
        evaluate: see ``Round``.
        deadline: see ``Round``.
        again: waits for sites and gives the cohort of a round that begins anew.
        ahead: the sum whose keys and shares went ahead with the last round; None: none did.
        last: whether no round follows in which all sites take part that are connected.

    Attributes:
        ahead: the next round's sum, when this one is combined; None: nothing went ahead.
    """

    kind = f"{MessageType.TRAIN}.{ACTION}"
    reply = MaskedTrainReply

    def __init__(
        self,
        parts: Parts,
        number: int,
        state: Tensors,
        *,
        evaluate: bool,
        deadline: float,
        again: Callable[[], list[int]],
        ahead: Members | None,
        last: bool,
    ) -> None:
        super().__init__(parts, number, state, evaluate=evaluate, deadline=deadline)
        assert parts.config.secure_aggregation is not None  # noqa: S101 - the round loop has looked
        self._secure, self._new_cohort = parts.config.secure_aggregation, again
        self._attempt = 0 if ahead is None else ahead.sum.id.attempt
        self._tries, self._norm = 1, 0.0
        self._ready, self._last = ahead, last
        self.ahead: Members | None = None
        self._broken: str | None = None  # why the round must begin anew, before its work was sent

    def begin(self, cohort: list[int]) -> None:
        """Exchange keys and shares with the nodes of a cohort, then send the round's work to those that are left."""
        try:
            self._open(cohort)
        except AggregationError as error:
            self._broken = f"round {self._number}: {error}{self._reasons()}"

    def combine(self) -> RoundResult:
        """See ``Round.combine``; with too few sites left the round begins anew, up to ``secure_aggregation.tries``."""
        while True:
            try:
                if self._broken is not None:
                    raise FederationError(self._broken, self.recorder.kinds)
                return super().combine()
            except FederationError as error:
                if self._tries >= self._secure.tries:
                    raise
                self._tries += 1
                self._begin_anew(str(error))

    def _begin_anew(self, reason: str) -> None:
        self.recorder.begin_anew(reason)
        self._parts.in_flight.forget(self._group)
        self._attempt, self._ready = self._attempt + 1, None
        self._group = f"train/{self._number}/{self._attempt}"
        self._broken, self._evaluate = None, False
        for known in (self._lost, self._again, self._given):
            known.clear()
        cohort = self._new_cohort()
        self._asked = time.monotonic()
        self.begin(cohort)

    def _open(self, cohort: list[int]) -> None:
        """Keys, shares, work.

        Raises:
            AggregationError: too few sites are left.
        """
        self._heaviest = self._limit(cohort)
        rule, versions = self._parts.strategy.rule, self._parts.strategy.versions
        rows = {self._name(node_id): self._rows(node_id) for node_id in cohort}
        most, active = max(rows.values()), rule.active(self._number, self._state)
        heaviest = int(min(self._heaviest, most))
        vector = Vector(self._parts.config, self._state, active, rule.exchange(self._number), most)
        version = tensors_digest(self._state) if versions is None else versions.latest
        settings = settings_digest(json.loads(self._parts.settings.federation))
        about = agreed_text(settings, version, active, most, heaviest)
        members = self._members(rows)
        self._this = OpenSum(members, vector, about, most, heaviest, rows)
        self.ahead = None if self._last else Members(replace(members.sum.id, server_round=self._number + 1))
        self._asked = time.monotonic()
        nodes = [self._parts.clients.node_of(site) for site in members.members if site in members.sharers()]
        self._ask([node_id for node_id in nodes if node_id is not None])

    def _members(self, sites: Collection[str]) -> Members:
        """The sum of these sites: the one that went ahead, if it is of the same, or one with fresh keys."""
        if self._ready is not None:
            if self._ready.sharers() == set(sites):
                return self._ready
            self._attempt += 1
        found = Members(SumId(self._parts.run, self._number, self._attempt, self._secure.threshold))
        self._exchange(KEYS, dict.fromkeys(sites, b""), found.add_keys)
        self._enough(len(found.members), "gave their keys")
        self._exchange(SHARES, dict.fromkeys(found.members, found.sum.listing.raw), found.add_shares)
        self._enough(len(found.sum.sharers), "shared their secrets")
        return found

    def _request(self, node_id: int, request: TrainRequest) -> MaskedTrainRequest:
        this, member = self._this, self._this.members.get(self._name(node_id))
        sealed = b"" if member is None else this.sum.shares_for(member)
        self.recorder.exchanged(len(sealed), 0)
        told: dict[str, Any] = {"attempt": self._attempt, "sealed": sealed, "wants_keys": self.ahead is not None}
        return MaskedTrainRequest(**vars(request), **told, rows=this.most_rows, heaviest=this.heaviest)

    def _admit(self, told: TrainReply, node_id: int) -> tuple[Update, UpdateSize]:
        """Add a site's masked numbers to the sum; the update that is returned has none."""
        this, site = self._this, self._name(node_id)
        assert isinstance(told, MaskedTrainReply)  # noqa: S101 - ``reply`` says so
        member = this.members.get(site)
        if member not in this.sum.sharers or member in this.sum.alive:
            raise RefusedUpdate(f"{site}: it has not shared its secrets, or has answered before")
        self._parts.strategy.acknowledge(told, node_id)
        if told.num_examples != this.rows[site]:
            raise RefusedUpdate(f"{site}: num-examples is {told.num_examples}, it declared {this.rows[site]} rows")
        if told.weight >= 2**32:
            raise RefusedUpdate(f"{site}: masked-weight is {told.weight}; allowed: 0 to 2^32 - 1")
        try:
            vector = this.vector.join(wire.decode(told.arrays, this.vector.most))
        except WireError as error:
            raise RefusedUpdate(f"{site}: {error}") from None
        if self.ahead is not None and told.next_keys is not None:
            self.ahead.add_keys(site, told.next_keys)
        this.sum.add_vector(member, np.append(vector, np.uint32(told.weight)))
        return Update(site, told.num_examples, {}), UpdateSize(0.0, 0.0, 0.0)

    def _counted(self) -> Iterator[Update]:
        """The mean of all updates, as one update, when the sum is unmasked and admitted."""
        for _ in self._updates():
            pass  # all are in the sum
        this, alive = self._this, self._this.alive()
        self._enough(len(alive), "sent their numbers")
        self._exchange(SURVIVORS, dict.fromkeys(alive, this.sum.survivors), this.add_signature, late=True)
        this.sum.require(len(this.signers()), "signed the list of survivors")
        self._exchange(UNMASK, dict.fromkeys(this.signers(), this.sum.signatures), this.add_unmasking, late=True)
        mean = self._mean()
        for site in alive:
            if site not in self.recorder.problems:
                self._parts.quarantine.note(site, refused=False)
        yield mean

    def _mean(self) -> Update:
        """The mean update.

        Raises:
            AggregationError: the sum cannot be unmasked, or its mean is more than training can do.
        """
        this, config, rule = self._this, self._parts.config, self._parts.strategy.rule
        weights = [weight_of(this.rows[site], this.heaviest) for site in this.alive()]
        try:
            words = this.total(weights)
        except AggregationError:
            for site in this.sum.inconsistent():
                self._refuse(site, f"{site}: it has sealed shares of no one secret", RefusedUpdate.__name__)
            raise
        tensors, factors = this.vector.mean(words, sum(weights), len(this.members))
        mean = Update(f"the mean of {len(weights)} updates", this.most_rows, tensors, rule.lora_alpha, factors)
        noise = self._noise(weights)
        norms = change_norms(mean, self._state)
        try:
            check_possible(mean, norms, self._state, config.training, config.strategy, noise)
        except RefusedUpdate as refusal:
            raise AggregationError(str(refusal)) from None
        self._norm = total(norms)
        return mean

    def _noise(self, weights: list[float]) -> Declared | None:
        """The noise in a mean of sites with these weights, at most; None: there is none.

        Raises:
            AggregationError: the sites left weigh too little for the noise that all add, whatever they weigh.
        """
        part, hellos = self._parts.config.shared_noise, self._parts.clients.hellos.values()
        times = math.sqrt(len(weights)) / sum(weights)
        if part and times > MOST_NOISE:
            raise AggregationError(f"the sites left weigh {sum(weights):.3g} together: too little beside their noise")
        local = [hello.privacy for hello in hellos if hello.privacy is not None]
        most = max(local, key=lambda declared: declared.noise, default=Declared(1.0, 0.0, 1.0, 1.0))
        found = replace(most, noise=most.noise + times * part)
        return found if found.noise else None

    def _diagnostics(self, outcome: RoundResult) -> dict[str, float]:
        """All that can be told of updates that nobody has seen."""
        del outcome
        return {"masked-updates": float(len(self._this.alive())), "mean-norm": self._norm}

    def _exchange(
        self, stage: str, payloads: Mapping[str, bytes], take: Callable[[str, bytes], None], *, late: bool = False
    ) -> None:
        """Send the messages of one exchange, and take the answers as they arrive.

        Args:
            stage: which exchange.
            payloads: the bytes to send, by site.
            take: takes a site's answer, or raises RefusedUpdate.
            late: whether the sites' numbers are with the server: then the threshold's number of answers is enough, and
                a site that fails has still taken part.
        """
        in_flight, group, since = self._parts.in_flight, f"{stage}/{self._number}/{self._attempt}", time.monotonic()
        in_flight.push(self._messages(stage, payloads), group)
        closes, answers = [since + self._secure.exchange_deadline], 0
        for sent, reply in in_flight.replies(group, lambda: closes[0]):
            site = self._name(sent.node_id)
            try:
                if (failure := failure_in(reply)) is None:
                    answer = ExchangeReply.read(reply.content)
                    take(site, answer.payload)
                    if stage == SURVIVORS and self.ahead is not None and answer.ahead is not None:
                        self.ahead.add_shares(site, answer.ahead)
                    self.recorder.exchanged(0, len(answer.payload) + len(answer.ahead or b""))
                    answers += 1
            except (WireError, RefusedUpdate) as error:
                failure = Failure.of(error)
            if failure is not None:
                self._fail(site, replace(failure, reason=f"{stage}: {failure.reason}"), took_part=late)
            if late and answers == self._secure.threshold:
                closes[0] = min(closes[0], time.monotonic() + _GRACE)
        for node_id in in_flight.forget(group):
            if not late or answers < self._secure.threshold:
                reason = f"{stage}: no answer within {closes[0] - since:.4g} seconds"
                failure = Failure(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason)
                self._fail(self._name(node_id), failure, took_part=late)
        self.recorder.elsewhere += time.monotonic() - since

    def _messages(self, stage: str, payloads: Mapping[str, bytes]) -> Iterator[Message]:
        """The messages of one exchange, to the sites that are connected."""
        about: dict[str, Any] = {"server_round": self._number, "attempt": self._attempt, "stage": stage}
        following = {} if self.ahead is None or stage != SURVIVORS else self.ahead.members
        enough = len(following) >= max(self._secure.threshold, self._cohort.min_clients)
        listing = self.ahead.sum.listing.raw if self.ahead is not None and enough else None
        for site, payload in payloads.items():
            ahead = listing if site in following else None
            request = ExchangeRequest(**vars(self._parts.settings), **about, payload=payload, ahead=ahead)
            if (node_id := self._parts.clients.node_of(site)) is not None:
                yield self._parts.message(request, node_id, f"{MessageType.QUERY}.{ACTION}", self._number)
                self.recorder.exchanged(len(payload) + len(ahead or b""), 0)

    def _enough(self, count: int, what: str) -> None:
        """Raise an AggregationError when fewer sites are left than a round needs."""
        if count < self._cohort.min_clients:
            raise AggregationError(f"{count} sites {what}, {self._cohort.min_clients} needed")

    def _name(self, node_id: int) -> str:
        return self._parts.strategy.client(node_id).name
