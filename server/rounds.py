"""The federation's life in one place: gather, train round by round, evaluate, finish."""

import time
from collections import deque
from collections.abc import Iterator

from flwr.app import ConfigRecordValues, Message
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.errors import AggregationError, FederationError, RefusedUpdate, StaleStateError
from server.checkpoint import Checkpoint, save
from server.evaluation import Evaluator
from server.mailbox import Mailbox
from server.notes import RoundNotes, scalars, under
from server.refusals import Refusals
from server.roster import Roster
from server.run_folder import RunFolder
from server.spool import Spool
from strategies.flower import Client, FlowerStrategy, sample
from strategies.norms import change_norms, check_possible, cohort_bound, total
from strategies.rule import Tensors, Update

_MEMORY = 5  # rounds whose slowest replies set an adaptive deadline
_LEAST_DEADLINE = 10.0  # seconds


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
        self._refusals = Refusals(folder.path, config.admission.max_refusals)
        self._slowest: deque[float] = deque(maxlen=_MEMORY)
        self._roster = Roster(
            grid,
            self._mailbox,
            folder,
            settings,
            self._refusals,
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
            FederationError: a round, or the start, had too few valid sites, or the disk is full.
        """
        done, versions = 0, None
        if resumed is not None:
            done, versions, state = resumed.round, resumed.versions, resumed.state
            self._refusals.counts = dict(resumed.refusals)
        self._strategy.begin(state, versions)
        self._roster.gather(self._config.cohort)
        for number in range(done + 1, self._config.rounds + 1):
            state = self._train(number, state)
            if number % self._config.checkpoint.every == 0:
                self._save(number, state)
        self._evaluate(self._config.rounds, state)
        self._note_late()
        return state

    def _train(self, number: int, state: Tensors) -> Tensors:
        """One round: the sites evaluate the state, when that is due, and train it."""
        notes = RoundNotes(number, self._folder)
        nodes = self._cohort(number)
        names = [self._roster.members[n].site for n in nodes]
        self._folder.event("round_started", round=number, clients=names, deadline=round(self._patience(), 1))
        due = (number - 1) % self._config.evaluation.every == 0
        group = f"train/{number}"
        self._send(notes, state, nodes, group, evaluate=due)
        asked = time.monotonic()
        if due:
            notes.elsewhere += self._record_server_evaluation(number - 1, state)  # while the sites work
        updates = self._updates(notes, state, group, evaluated=due, asked=asked)
        try:
            outcome = self._strategy.combine(number, state, self._counted(notes, updates))
        except AggregationError as error:
            raise FederationError(f"round {number}: {error}{_reasons(notes)}") from None
        valid, needed = len(notes.admitted), self._config.cohort.min_clients
        if valid < needed:
            raise FederationError(f"round {number}: {valid} valid updates, {needed} needed{_reasons(notes)}")
        self._slowest.append(max(notes.admitted.values()))
        notes.close(outcome.diagnostics)
        return outcome.state

    def _save(self, number: int, state: Tensors) -> None:
        bytes_ = self._folder.metrics_bytes()
        checkpoint = Checkpoint(number, state, self._strategy.versions, bytes_, self._refusals.counts)
        save(self._folder.path, checkpoint, self._config.checkpoint.keep)

    def _cohort(self, number: int) -> list[int]:
        """The sites of a round, sampled from those that are connected."""
        cohort = self._config.cohort
        self._note_late()
        self._roster.gather(cohort)
        self._meet()
        nodes = self._roster.connected()
        return sample(nodes, cohort.fraction, cohort.min_clients, self._config.training.seed, number)

    def _meet(self) -> None:
        """Tell the strategy of sites that are new."""
        for node_id, member in self._roster.members.items():
            if node_id not in self._strategy.clients:
                rank = member.rank if self._strategy.rule.mixed_ranks else None
                self._strategy.clients[node_id] = Client(member.site, rank, has_base=True)

    def _send(self, notes: RoundNotes, state: Tensors, nodes: list[int], group: str, *, evaluate: bool) -> None:
        settings: dict[str, ConfigRecordValues] = {"federation": self._settings, "evaluate": evaluate}
        messages = self._strategy.train_messages(notes.number, state, nodes, settings, self._lifetime)
        for message in messages:
            notes.asked(message)
        self._mailbox.push(messages, group)

    @property
    def _lifetime(self) -> float:
        """Seconds that a message and its reply live: beyond the deadline, so that a late reply is told from none."""
        return 2 * self._config.cohort.round_deadline

    def _patience(self) -> float:
        """Seconds after which a round closes once it has ``min_clients`` updates."""
        cohort = self._config.cohort
        if cohort.deadline_factor is None or not self._slowest:
            return cohort.round_deadline
        return min(cohort.round_deadline, max(_LEAST_DEADLINE, cohort.deadline_factor * max(self._slowest)))

    def _updates(
        self, notes: RoundNotes, state: Tensors, group: str, *, evaluated: bool, asked: float
    ) -> Iterator[tuple[Update, float]]:
        """Well-formed updates with their norms as they arrive; what is refused, fails or stays away is noted."""
        cohort, patience = self._config.cohort, self._patience()

        def deadline() -> float:
            return asked + (patience if len(notes.admitted) >= cohort.min_clients else cohort.round_deadline)

        since = time.monotonic()
        resent: set[int] = set()
        for sent, reply in self._mailbox.replies(
            group, deadline, lambda: self._welcome(notes, state, group, evaluated)
        ):
            notes.elsewhere += time.monotonic() - since
            name = self._strategy.client(sent.node_id).name
            try:
                update, norm = self._read(reply, sent.node_id)
            except RefusedUpdate as refusal:
                stale = reply.has_error() and reply.error.code == StaleStateError.code
                if stale and sent.node_id not in resent and sent.node_id in self._roster.connected():
                    resent.add(sent.node_id)  # it has lost what it held: once more, without that
                    self._send(notes, state, [sent.node_id], group, evaluate=evaluated)
                elif reply.has_error():
                    notes.problem(name, "client_failed", str(refusal))
                else:
                    self._refuse(notes, name, str(refusal))
            else:
                metrics = notes.update(sent, reply, update)
                if evaluated:
                    self._record_evaluation(notes.number - 1, name, under("evaluate.", metrics))
                yield update, norm
                del update
            since = time.monotonic()
        notes.elsewhere += time.monotonic() - since
        for node_id in self._mailbox.forget(group):
            name = self._strategy.client(node_id).name
            notes.problem(name, "client_failed", f"{name}: no answer within {deadline() - asked:.4g} seconds")

    def _welcome(self, notes: RoundNotes, state: Tensors, group: str, evaluated: bool) -> None:
        """Take in who comes late; a site that comes back as a new node is given the work that its old one has lost."""
        if not self._roster.greet():
            return
        for node_id in self._mailbox.waiting(group):
            successor = self._roster.successor(node_id)
            if successor is not None:
                self._mailbox.forget(group, node_id)
                self._meet()
                self._send(notes, state, [successor], group, evaluate=evaluated)

    def _read(self, reply: Message, node_id: int) -> tuple[Update, float]:
        """The update in a reply, and the norm of its change.

        Raises:
            RefusedUpdate: with the reason.
        """
        update = self._strategy.read_update(reply, node_id)
        declared = self._roster.members[node_id].train_rows
        if update.num_examples != declared:
            raise RefusedUpdate(f"{update.client}: num-examples is {update.num_examples}, it declared {declared} rows")
        base = self._strategy.base_of(node_id)
        norms = change_norms(update, base)
        check_possible(update, norms, base, self._config.training, self._config.strategy)
        return update, total(norms)

    def _counted(self, notes: RoundNotes, updates: Iterator[tuple[Update, float]]) -> Iterator[Update]:
        """The updates that count: all of them as they arrive, or, by name, those that move as far as most do."""
        ratio = self._config.admission.norm_ratio
        if ratio is None:
            for update, _ in updates:
                self._refusals.note(update.client, refused=False)
                yield update
            return
        norms: dict[str, float] = {}
        with Spool(self._folder.path / "incoming") as spool:
            for update, norm in updates:
                norms[update.client] = norm
                spool.put(update)
                del update
            bound = cohort_bound(norms, ratio)
            for update in spool.updates():
                norm = norms[update.client]
                if norm <= bound:
                    self._refusals.note(update.client, refused=False)
                    yield update
                else:
                    limit = f"allowed: {bound:.3g}, {ratio:g} times the round's median"
                    self._refuse(notes, update.client, f"{update.client}: its update moved by {norm:.3g}; {limit}")

    def _refuse(self, notes: RoundNotes, site: str, reason: str) -> None:
        notes.problem(site, "update_refused", reason)
        before = self._refusals.excluded()
        self._refusals.note(site, refused=True)
        for left_out in self._refusals.excluded().keys() - before.keys():
            self._folder.event("client_excluded", client=left_out, reason=self._refusals.excluded()[left_out])

    def _note_late(self) -> None:
        """Say so when an answer has come after its round was closed; it is dropped."""
        for sent in self._mailbox.late(self._lifetime):
            name, after = self._strategy.client(sent.node_id).name, time.time() - sent.at
            reason = f"{name}: its answer to {sent.group} was seen after {after:.4g} seconds, too late; it is dropped"
            self._folder.event("late_reply", client=name, reason=reason)

    def _evaluate(self, version: int, state: Tensors) -> None:
        """The final state, at every site that is still connected and at the server."""
        nodes = self._roster.connected()
        group = f"evaluate/{version}"
        settings: dict[str, ConfigRecordValues] = {"federation": self._settings}
        patience = self._config.cohort.round_deadline
        self._mailbox.push(self._strategy.evaluate_messages(version, state, nodes, settings, self._lifetime), group)
        deadline = time.monotonic() + patience
        self._record_server_evaluation(version, state)
        for sent, reply in self._mailbox.replies(group, lambda: deadline):
            name = self._strategy.client(sent.node_id).name
            if reply.has_error():
                self._folder.event("client_failed", round=version, client=name, reason=f"{name}: {reply.error.reason}")
            else:
                self._record_evaluation(version, name, under("evaluate.", scalars(reply)))
        for node_id in self._mailbox.forget(group):
            name = self._strategy.client(node_id).name
            reason = f"{name}: no evaluation within {patience:g} seconds"
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


def _reasons(notes: RoundNotes) -> str:
    return "".join(f"; {reason}" for reason in notes.problems.values())
