"""The round loop: wait for the sites, train round by round, evaluate, finish."""

import time
from collections import deque
from functools import partial

from flwr.app import MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.config.federation import FederationConfig
from common.config.section import SERVER
from common.errors import WireError
from common.protocol.messages import EvaluateReply, EvaluateRequest, Failure, HelloRequest
from server.loop.best import BestRound
from server.loop.checkpoint import Checkpoint, save
from server.loop.clients import Clients
from server.loop.delivery import Delivery, telling
from server.loop.inflight import InFlight, failure_in
from server.loop.masked_round import MaskedRound
from server.loop.open_sum import Members
from server.loop.recorder import record_evaluation
from server.loop.round import Parts, Round
from server.loop.server_model import ServerModel
from server.run.folder import RunFolder
from server.run.quarantine import Quarantine
from strategies.flower.messages import RuleMessages
from strategies.flower.strategy import sample
from strategies.rule import Tensors

_MEMORY = 5  # rounds whose slowest replies set an adaptive deadline
_LEAST_DEADLINE = 10.0  # seconds


class RoundLoop:
    """Runs a federation from the first hello to the last evaluation.

    Args:
        grid: Flower's grid.
        config: the federation file.
        settings: the content of every request.
        strategy: the strategy with its messages.
        server_model: the server's own model.
        folder: the run folder.
    """

    def __init__(
        self,
        grid: Grid,
        config: FederationConfig,
        settings: HelloRequest,
        strategy: RuleMessages,
        server_model: ServerModel,
        folder: RunFolder,
    ) -> None:
        self._config, self._strategy, self._server_model, self._folder = config, strategy, server_model, folder
        self._in_flight = InFlight(grid)
        self._quarantine = Quarantine(folder.path, config.admission.max_refusals)
        self._clients = Clients(
            grid,
            self._in_flight,
            folder,
            settings,
            self._quarantine,
            config.admission.model_copy(update={"max_noise": max(config.admission.max_noise, config.shared_noise)}),
            base_digest=server_model.base_digest,
            tokenizer_digest=server_model.tokenizer_digest,
            expected=None if config.local is None else len(config.local.sites),
        )
        self._best = BestRound(config, folder)
        told = telling(server_model, folder.path, self._clients, self._best)
        shared = settings, strategy, self._in_flight, self._clients, self._quarantine, folder, self._best, told
        self._parts = Parts(config, *shared, 0 if config.secure_aggregation is None else grid.run.run_id)
        self._slowest: deque[float] = deque(maxlen=_MEMORY)
        self._ahead: Members | None = None  # keys and shares of the next round's masked sum

    def run(self, state: Tensors, resumed: Checkpoint | None = None) -> Tensors:
        """Run all rounds, or those after a checkpoint; return the final state.

        Args:
            state: the base model's state.
            resumed: the checkpoint to resume from; None: start with round 1.

        Raises:
            FederationError: a round, or the start, had too few valid sites, or the disk is full.
            ConfigError: nobody measures the score that is to decide about the best round.
        """
        done, versions, moments, waiting = 0, None, None, None
        if resumed is not None:
            done, versions, state = resumed.round, resumed.versions, resumed.state
            moments, waiting = resumed.moments, resumed.waiting
            self._quarantine.counts = dict(resumed.refusals)
            self._best.go_on()
        self._strategy.begin(state, versions, moments, waiting)
        if self._strategy.versions is not None:
            self._strategy.versions.keep_all = self._config.secure_aggregation is not None
        if done and self._folder.fact("last_round") == done:  # all but the delivery was done
            return state
        self._clients.wait_for(self._config.cohort)
        self._best.check_measured(self._clients.hellos.values())
        number = done
        while not self._is_last(number):
            number, before, version = number + 1, state, self._version()
            state = self._train(number, state)
            self._best.judge(number - 1, before, version)
            if self._is_last(number):
                state = self._strategy.settle(before, state)
            if number % self._config.checkpoint.every == 0 or self._is_last(number):
                self._save(number, state)
        if (reason := self._best.reason_to_stop) is not None and number < self._config.rounds:
            self._folder.event("stopped_early", round=number, reason=reason)
            self._folder.model_info({"stopped_early": reason})
        self._evaluate(number, state)
        self._best.judge(number, state, self._version())
        self._note_late()
        self._folder.model_info({"last_round": number})
        return state

    def deliver(self, state: Tensors) -> None:
        """Write the models, and have them written at the sites; ``state``: as ``run`` has returned it."""
        Delivery(self._parts, self._server_model, self._folder.fact("last_round"), state).run()

    def _is_last(self, number: int) -> bool:
        return number == self._config.rounds or self._best.reason_to_stop is not None

    def _version(self) -> str | None:
        versions = self._strategy.versions
        return None if versions is None else versions.latest

    def _train(self, number: int, state: Tensors) -> Tensors:
        """One round: the sites evaluate the state, if an evaluation is due, and train (decision 002)."""
        self._note_late()
        nodes, deadline = self._cohort(number), self._deadline()
        due = (number - 1) % self._config.evaluation.every == 0
        names = [self._clients.hellos[n].site for n in nodes]
        self._folder.event("round_started", round=number, clients=names, deadline=round(deadline, 1))
        this = self._round(number, state, evaluate=due, deadline=deadline)
        this.begin(nodes)
        if due:
            this.recorder.elsewhere += self._evaluate_here(number - 1, state)  # while the sites work
        outcome = this.combine()
        self._slowest.append(max(this.recorder.admitted.values()))
        self._ahead = this.ahead if isinstance(this, MaskedRound) else None
        return outcome.state

    def _round(self, number: int, state: Tensors, *, evaluate: bool, deadline: float) -> Round:
        secure, again = self._config.secure_aggregation, partial(self._cohort, number)
        if secure is None:
            return Round(self._parts, number, state, evaluate=evaluate, deadline=deadline)
        all_ = self._config.cohort.fraction == 1.0 and len(self._clients.connected()) < 2 * secure.threshold
        return MaskedRound(
            self._parts,
            number,
            state,
            evaluate=evaluate,
            deadline=deadline,
            again=again,
            ahead=self._ahead,
            last=not all_ or number == self._config.rounds,
        )

    def _save(self, number: int, state: Tensors) -> None:
        bytes_, optimizer = self._folder.metrics_bytes(), self._strategy.server_optimizer
        moments = {} if optimizer is None else optimizer.moments
        waiting = {} if self._strategy.way_down is None else self._strategy.way_down.waiting
        counts = self._quarantine.counts
        checkpoint = Checkpoint(number, state, self._strategy.versions, bytes_, counts, moments, waiting)
        save(self._folder.path, checkpoint, self._config.checkpoint.keep)
        self._best.saved()

    def _cohort(self, number: int) -> list[int]:
        """The sites of a round, sampled from those that are connected."""
        cohort = self._config.cohort
        self._clients.wait_for(cohort)
        self._clients.register_with(self._strategy)
        seed, secure = self._config.training.seed, self._config.secure_aggregation
        nodes = sample(self._clients.connected(), cohort.fraction, cohort.min_clients, seed, number)
        return nodes if secure is None else sample(nodes, 0.0, 2 * secure.threshold - 1, seed, number)

    def _deadline(self) -> float:
        """Seconds after which a round closes once it has ``min_clients`` updates."""
        cohort = self._config.cohort
        if cohort.deadline_factor is None or not self._slowest:
            return cohort.round_deadline
        return min(cohort.round_deadline, max(_LEAST_DEADLINE, cohort.deadline_factor * max(self._slowest)))

    def _note_late(self) -> None:
        """Note replies that arrived after their round was closed; they are dropped."""
        for sent in self._in_flight.late(self._parts.lifetime):
            name, after = self._strategy.client(sent.node_id).name, time.time() - sent.at
            reason = f"{name}: its answer to {sent.group} was seen after {after:.4g} seconds, too late; it is dropped"
            self._folder.event("late_reply", client=name, reason=reason)

    def _evaluate(self, version: int, state: Tensors) -> None:
        """Evaluate the final state at the sites and at the server."""
        nodes = self._to_evaluate()
        group = f"evaluate/{version}"
        seconds = self._config.cohort.round_deadline
        states = self._strategy.evaluate_states(version, state, nodes)
        requests = ((node_id, EvaluateRequest.of(self._parts.settings, state)) for node_id, state in states)
        messages = [self._parts.message(asked, n, MessageType.EVALUATE, version) for n, asked in requests]
        self._in_flight.push(messages, group)
        closes_at = time.monotonic() + seconds
        self._evaluate_here(version, state)
        for sent, reply in self._in_flight.replies(group, lambda: closes_at):
            name = self._strategy.client(sent.node_id).name
            try:
                failure = failure_in(reply)
                told = EvaluateReply.read(reply.content) if failure is None else EvaluateReply()
            except WireError as unreadable:
                failure = Failure.of(unreadable)
            if failure is not None:
                self._note_failure(version, name, failure)
            else:
                record_evaluation(self._folder, version, name, told.scores)
        for node_id in self._in_flight.forget(group):
            name = self._strategy.client(node_id).name
            failure = Failure(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"no evaluation within {seconds:g} seconds")
            self._note_failure(version, name, failure)

    def _to_evaluate(self) -> list[int]:
        """The sites that evaluate the final state: all that are connected."""
        return self._clients.connected()

    def _note_failure(self, version: int, name: str, failure: Failure) -> None:
        reason = f"{name}: {failure.reason}"
        self._folder.event("client_failed", round=version, client=name, reason=reason, kind=failure.kind, counted=False)

    def _evaluate_here(self, version: int, state: Tensors) -> float:
        """Evaluate on the server's own set; returns the seconds taken."""
        started = time.monotonic()
        metrics = self._server_model.evaluate(state)
        seconds = time.monotonic() - started
        record_evaluation(self._folder, version, SERVER, metrics, seconds)
        return seconds
