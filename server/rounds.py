"""The federation's life in one place: gather, train round by round, evaluate, finish."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecordValues, Message, MetricRecord
from flwr.serverapp import Grid

from common import wire
from common.config import FederationConfig
from common.errors import AggregationError, FederationError, RefusedUpdate, StaleStateError
from common.records import get_record, get_records
from server.checkpoint import Checkpoint, save
from server.evaluation import Evaluator
from server.mailbox import Mailbox, Sent
from server.roster import Roster
from server.run_folder import RunFolder
from strategies.flower import Client, FlowerStrategy, sample
from strategies.rule import Tensors, Update


@dataclass
class _Round:
    """Notes of the round under way."""

    number: int
    started: float
    records: list[tuple[float, dict[str, object]]] = field(default_factory=list)  # (when it was done, metrics record)
    problems: dict[str, str] = field(default_factory=dict)  # site -> reason
    sent: dict[int, int] = field(default_factory=dict)  # node id -> bytes
    bytes_up: int = 0
    elsewhere: float = 0.0  # seconds not spent on combining: waiting for replies, evaluating


class RoundLoop:
    """Runs a federation from the first hello to the last evaluation.

    Args:
        grid: Flower's grid.
        config: the federation file.
        settings: what of it the sites receive, as JSON.
        strategy: how updates are combined.
        evaluator: holds the server's model.
        folder: where everything is written down.
    """

    def __init__(
        self,
        grid: Grid,
        config: FederationConfig,
        settings: str,
        strategy: FlowerStrategy,
        evaluator: Evaluator,
        folder: RunFolder,
    ) -> None:
        self._config, self._settings = config, settings
        self._strategy, self._evaluator, self._folder = strategy, evaluator, folder
        self._mailbox = Mailbox(grid)
        self._roster = Roster(
            grid,
            self._mailbox,
            folder,
            settings,
            base_digest=evaluator.base_digest,
            tokenizer_digest=evaluator.tokenizer_digest,
            expected=None if config.local is None else len(config.local.sites),
        )

    def run(self, state: Tensors, resumed: Checkpoint | None = None) -> Tensors:
        """All rounds, or those that are left, to the final state.

        Args:
            state: of the base model.
            resumed: the round to go on after; None: begin with the first.

        Raises:
            FederationError: a round, or the start, had too few valid sites, or a checkpoint cannot be written.
        """
        done, versions = (0, None) if resumed is None else (resumed.round, resumed.versions)
        state = state if resumed is None else resumed.state
        self._strategy.begin(state, versions)
        self._roster.gather(self._config.cohort)
        for number in range(done + 1, self._config.rounds + 1):
            state = self._train(number, state)
            if number % self._config.checkpoint.every == 0:
                self._save(number, state)
        self._evaluate(self._config.rounds, state)
        return state

    def _train(self, number: int, state: Tensors) -> Tensors:
        """One round: the sites evaluate the state, when that is due, and train it."""
        cohort, strategy = self._config.cohort, self._strategy
        this = _Round(number, time.monotonic())
        nodes = self._cohort(number)
        names = [self._roster.members[n].site for n in nodes]
        self._folder.event("round_started", round=number, clients=names)
        due = (number - 1) % self._config.evaluation.every == 0
        group = f"train/{number}"
        self._send(this, state, nodes, group, evaluate=due)
        deadline = time.monotonic() + cohort.round_deadline
        if due:
            this.elsewhere += self._record_server_evaluation(number - 1, state)  # while the sites work
        try:
            outcome = strategy.combine(number, state, self._updates(this, state, group, due, deadline))
        except AggregationError as error:
            raise FederationError(f"round {number}: {error}{_reasons(this.problems)}") from None
        valid, needed = len(this.records), cohort.min_clients
        if valid < needed:
            raise FederationError(f"round {number}: {valid} valid updates, {needed} needed{_reasons(this.problems)}")
        self._close(this, outcome.diagnostics)
        return outcome.state

    def _save(self, number: int, state: Tensors) -> None:
        checkpoint = Checkpoint(number, state, self._strategy.versions, self._folder.metrics_bytes())
        save(self._folder.path, checkpoint, self._config.checkpoint.keep)

    def _cohort(self, number: int) -> list[int]:
        """The sites of a round, sampled from those that are connected."""
        cohort = self._config.cohort
        self._roster.gather(cohort)
        for node_id, member in self._roster.members.items():
            if node_id not in self._strategy.clients:
                rank = member.rank if self._strategy.rule.mixed_ranks else None
                self._strategy.clients[node_id] = Client(member.site, rank, has_base=True)
        nodes = self._roster.connected()
        return sample(nodes, cohort.fraction, cohort.min_clients, self._config.training.seed, number)

    def _send(self, this: _Round, state: Tensors, nodes: list[int], group: str, *, evaluate: bool) -> None:
        settings: dict[str, ConfigRecordValues] = {"federation": self._settings, "evaluate": evaluate}
        ttl = self._config.cohort.round_deadline
        messages = self._strategy.train_messages(this.number, state, nodes, settings, ttl)
        for message in messages:
            node_id = message.metadata.dst_node_id
            this.sent[node_id] = this.sent.get(node_id, 0) + _payload(message)
        self._mailbox.push(messages, group)

    def _updates(self, this: _Round, state: Tensors, group: str, evaluated: bool, deadline: float) -> Iterator[Update]:
        """Admitted updates as they arrive; what is refused, fails or stays away is noted."""
        asked = time.monotonic()
        resent: set[int] = set()
        for sent, reply in self._mailbox.replies(group, deadline):
            this.elsewhere += time.monotonic() - asked
            client = self._strategy.client(sent.node_id)
            try:
                update = self._strategy.read_update(reply, sent.node_id)
                self._check_examples(sent.node_id, update)
            except RefusedUpdate as refusal:
                stale = reply.has_error() and reply.error.code == StaleStateError.code
                if stale and sent.node_id not in resent and sent.node_id in self._roster.connected():
                    resent.add(sent.node_id)  # it has lost what it held: once more, without that
                    self._send(this, state, [sent.node_id], group, evaluate=evaluated)
                else:
                    kind = "client_failed" if reply.has_error() else "update_refused"
                    self._note_problem(this, client.name, kind, str(refusal))
            else:
                self._note_update(this, sent, reply, update, evaluated)
                yield update
            asked = time.monotonic()
            self._roster.greet()  # who comes late joins the next round
        this.elsewhere += time.monotonic() - asked
        for node_id in self._mailbox.forget(group):
            name = self._strategy.client(node_id).name
            reason = f"{name}: no answer within {self._config.cohort.round_deadline:g} seconds"
            self._note_problem(this, name, "client_failed", reason)

    def _check_examples(self, node_id: int, update: Update) -> None:
        declared = self._roster.members[node_id].train_rows
        if update.num_examples != declared:
            raise RefusedUpdate(f"{update.client}: num-examples is {update.num_examples}, it declared {declared} rows")

    def _note_problem(self, this: _Round, name: str, kind: str, reason: str) -> None:
        this.problems[name] = reason
        self._folder.event(kind, round=this.number, client=name, reason=reason)

    def _note_update(self, this: _Round, sent: Sent, reply: Message, update: Update, evaluated: bool) -> None:
        metrics = {
            key: float(v)
            for key, v in get_record(reply.content, "metrics", MetricRecord).items()
            if not isinstance(v, list)
        }
        up = _payload(reply)
        this.bytes_up += up
        trained = {**_under("train.", metrics), "num_examples": update.num_examples}
        if trained.get("seconds"):
            trained["tokens_per_second"] = trained.get("tokens", 0.0) / trained.pop("seconds")
        seconds = _transport(sent, metrics) | _under("seconds.", metrics)
        record = {
            "round": this.number,
            "client": update.client,
            "phase": "train",
            "train": trained,
            "bytes": {"down": this.sent[sent.node_id], "up": up},
            "seconds": seconds,
        }
        this.records.append((time.monotonic(), record))
        loss = metrics.get("train.loss")
        spent = round(time.time() - sent.at, 3)
        self._folder.event("reply", round=this.number, client=update.client, phase="train", loss=loss, seconds=spent)
        if evaluated:
            self._record_evaluation(this.number - 1, update.client, _under("evaluate.", metrics))

    def _close(self, this: _Round, diagnostics: dict[str, float]) -> None:
        """Write the round's records, now that it is known how long each site waited for the others."""
        end = time.monotonic()
        aggregate = end - this.started - this.elsewhere
        for done, record in this.records:
            record["seconds"]["wait"] = end - done  # type: ignore[index]
            self._folder.metrics(record)
            rounding = record["train"].get("wire_error")  # type: ignore[attr-defined]
            if rounding is not None:
                diagnostics = {**diagnostics, f"wire-error/{record['client']}": rounding}
        self._folder.metrics(
            {
                "round": this.number,
                "client": "server",
                "phase": "aggregate",
                "diagnostics": diagnostics,
                "seconds": {"aggregate": aggregate},
            }
        )
        self._folder.event(
            "round_finished",
            round=this.number,
            seconds=round(end - this.started, 3),
            bytes_down=sum(this.sent.values()),
            bytes_up=this.bytes_up,
        )

    def _evaluate(self, version: int, state: Tensors) -> None:
        """The final state, at every site that is still connected and at the server."""
        nodes = self._roster.connected()
        group = f"evaluate/{version}"
        settings: dict[str, ConfigRecordValues] = {"federation": self._settings}
        ttl = self._config.cohort.round_deadline
        self._mailbox.push(self._strategy.evaluate_messages(version, state, nodes, settings, ttl), group)
        self._record_server_evaluation(version, state)
        for sent, reply in self._mailbox.replies(group, time.monotonic() + ttl):
            name = self._strategy.client(sent.node_id).name
            if reply.has_error():
                self._folder.event("client_failed", round=version, client=name, reason=f"{name}: {reply.error.reason}")
                continue
            metrics = get_record(reply.content, "metrics", MetricRecord)
            numbers = {key: float(v) for key, v in metrics.items() if not isinstance(v, list)}
            self._record_evaluation(version, name, _under("evaluate.", numbers))
        for node_id in self._mailbox.forget(group):
            name = self._strategy.client(node_id).name
            reason = f"{name}: no evaluation within {ttl:g} seconds"
            self._folder.event("client_failed", round=version, client=name, reason=reason)

    def _record_server_evaluation(self, version: int, state: Tensors) -> float:
        """Evaluate on the server's own set; the seconds that took."""
        started = time.monotonic()
        metrics = self._evaluator.evaluate(state)
        seconds = time.monotonic() - started
        self._record_evaluation(version, "server", metrics, seconds)
        return seconds

    def _record_evaluation(
        self, version: int, client: str, metrics: dict[str, float], seconds: float | None = None
    ) -> None:
        if not metrics:
            return
        record: dict[str, object] = {"round": version, "client": client, "phase": "evaluate", "evaluate": metrics}
        if seconds is not None:
            record["seconds"] = {"evaluate": seconds}
        self._folder.metrics(record)
        self._folder.event(
            "evaluated", round=version, client=client, loss=metrics.get("loss"), rouge_l=metrics.get("rouge_l")
        )


def _payload(message: Message) -> int:
    return sum(wire.num_bytes(arrays) for arrays in get_records(message.content, ArrayRecord).values())


def _under(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _transport(sent: Sent, metrics: dict[str, float]) -> dict[str, float]:
    """Seconds from the SuperLink to the site's code and back, polling and process start included.

    Taken from both machines' clocks, so only as good as these agree; never below zero.
    """
    now = time.time()
    started, finished = metrics.get("clock.started", sent.at), metrics.get("clock.finished", now)
    return {"download": max(0.0, started - sent.at), "upload": max(0.0, now - finished)}


def _reasons(problems: dict[str, str]) -> str:
    return "".join(f"; {reason}" for reason in problems.values())
