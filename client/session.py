"""A site's work on one federation: rows, model, training, evaluation. No Flower.

A session holds everything that is expensive to make (model, tokenizer, encoded rows), so a process that answers several
messages makes it once (decision 007).
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from client.held_weights import Weights
from client.rank import Part
from client.reach import Reach
from client.site_model import Bases, SiteModel
from client.training.between_rounds import capture, restore
from client.training.settings import describe, pick_autocast
from client.training.team import Team
from client.update import PreparedUpdate, Work
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.data.evaluation import EvalSettings
from common.data.rows import Row, split_held_out
from common.data.tasks import make_task
from common.errors import FedSpanError, StaleStateError, place_of
from common.metrics import COUNTS
from common.model import second_moments
from common.model.adapters import cut
from common.model.tuning import Tuned
from common.protocol.digest import tensors_digest
from common.protocol.messages import Declared, Hello
from common.protocol.tensors import Tensors
from common.protocol.versions import Step
from common.system.machine import release
from common.text import installed

log = logging.getLogger(__name__)


class Session:
    """A site in one federation.

    Example, one round without Flower from the state ``tensors``::

        session = Session(load(site_file, SiteConfig), site_file, federation)
        session.set_state(tensors, None, active := list(session.exchanged))
        update, numbers = session.train(1, active)

    Args:
        site: the site file's content.
        site_file: the site file's path, which relative paths refer to.
        federation: the federation's settings, as the server sent them.
        bases: base models that the sites of this process share; None: this process has one site.

    Attributes:
        kept: tensors that the site keeps for its next round and never sends: a local head, optimizer moments. They must
            be carried over to a new session.
        update_norm: L2 norm of the last update, in the form to send.
        model: the model.
        aside: error of the last training that is hidden from the operator (`privacy`); None: no error.
        on_step: called after every step of training, with the number of steps done and of all.
    """

    def __init__(
        self, site: SiteConfig, site_file: Path, federation: FederationConfig, bases: Bases | None = None
    ) -> None:
        self.site, self._site_file, self.federation = site, site_file, federation
        self._task = make_task(federation.task)
        self._seconds: dict[str, float] = {}
        self.model = SiteModel(site, site_file, federation, self._task, bases, self._seconds)
        self._max_batch_size, self._left_out = site.max_batch_size, 0  # rows: smaller after memory ran out; left out
        self.kept: Tensors = {}
        self.update_norm: float | None = None
        self.aside: str | None = None
        self.on_step: Callable[[int, int], None] | None = None

    def hello(self) -> Hello:
        """Load rows and model, and make the site's hello.

        Raises:
            DataError: the shard cannot be used.
            ModelError: the base model cannot be used.
        """
        (train_rows, held_out), (model, tokenizer) = self._rows, self.model.digests
        self.model.check()
        return Hello(
            site=self.site.name,
            train_rows=len(train_rows),
            held_out_rows=len(held_out),
            device=describe(self.model.devices, self.model.held.quantization, split=self.site.split),
            rank=self.model.rank,
            base_digest=model,
            tokenizer_digest=tokenizer,
            version=installed("fedspan"),
            keeps=None if self.site.keep is None else self.site.keep.when,
            privacy=None if self.site.privacy is None else Declared.of(self.site.privacy, self.federation.shared_noise),
        )

    def follow(self, steps: list[Step], since: str, version: str) -> None:
        """Bring the weights to ``version`` by steps from ``since``.

        Raises:
            StaleStateError: the site does not hold ``since``.
            WireError: a step does not match the weights, or is larger than a round's training can make.
        """
        if since == (held := self.model.weights).first and (not held.proven or held.version not in (since, version)):
            self.model.start_anew()
        self.model.weights.follow(steps, since, version, self._reach)
        self._tuned.set(cut(self.model.weights.tensors, self.model.rank))
        self.model.set_local(self.kept)

    @property
    def weights(self) -> Weights | None:
        """The federation's weights and their version; None for strategies that change no base weight."""
        return self.model.weights if self.federation.strategy.changes_base else None

    @property
    def exchanged(self) -> Mapping[str, torch.Tensor]:
        """The federation's tensors in this site's rank, by name."""
        return self.model.exchanged

    def set_state(
        self, tensors: Tensors, frozen_digest: str | None, active: list[str], version: str = "unknown", after: int = 0
    ) -> Tensors:
        """Write the federation's tensors into the model; return those that are frozen in this round.

        Args:
            tensors: all of the federation's tensors, sent or kept.
            frozen_digest: digest of the frozen tensors; None when all tensors were sent.
            active: names of the tensors that the round trains.
            version: name of the version, for base weights that were sent dense.
            after: number of rounds after which this is the state; 0: the first state.

        Raises:
            StaleStateError: a tensor is neither sent nor kept from an earlier round, or a kept one is out of date.
            WireError: training cannot have made this state (``client.reach``).
        """
        if self.weights is not None and 0 < self.weights.after >= after:  # also the same state, in other last bits
            self.model.start_anew()
        weights, exchanged = self.weights, self.exchanged  # made from the base model, so before it is overwritten
        missing = exchanged.keys() - tensors.keys()
        if missing:
            raise StaleStateError(
                f"{len(missing)} tensor(s) neither sent nor kept, e.g. {min(missing)}; send them in full"
            )
        frozen = {name: tensors[name] for name in self._tuned.parameters if name not in set(active)}
        if frozen_digest is not None and tensors_digest(frozen) != frozen_digest:
            raise StaleStateError("the frozen tensors kept from an earlier round are out of date; send them in full")
        if weights is None:
            self.model.known.take(tensors, after, self._reach)
        else:
            self._reach.check_like(tensors, exchanged)
            self._reach.check(tensors, exchanged, self._reach.rounds(weights.after, after), weights.after == 0)
            weights.replace(tensors, version, after)
        self._tuned.set(tensors)
        self.model.set_local(self.kept)
        return frozen

    def refill(self) -> None:
        """Write the held state into the model again, after something else was written into it."""
        held = self.model.known.last if self.weights is None else cut(self.weights.tensors, self.model.rank)
        self._tuned.set(held or {})
        self.model.set_local(self.kept)

    def work(self, server_round: int, active: list[str]) -> Work:
        """Plan a round's work from the state set before; no row is read."""
        return Work(self.model, self.federation, self.site.privacy, server_round, active, self.train_rows)

    def train(self, server_round: int, active: list[str]) -> tuple[Tensors, dict[str, float]]:
        """Train the active tensors for one round, from the state set before.

        Returns:
            The tensors to send: the active tensors after training, under FedFTG in factors where these are smaller
            (``common.protocol.factors``), clipped and noised with `privacy`. And the numbers of
            ``common.protocol.messages.TRAINING``, by name.

        Raises:
            TrainingError: training cannot start or continue; with `privacy` instead the update is noise alone.
        """
        started, self.aside = time.monotonic(), None
        work = self.work(server_round, active)
        start = work.start()
        if (done := self._trained(work, start)) is None:
            release()
            done = work.nothing(start)
        update, numbers = done
        self.update_norm = update.norm
        if update.wire_error is not None:
            numbers["wire_error"] = update.wire_error
        if self._left_out:
            numbers["rows_left_out"] = self._left_out
        self._seconds["train"] = time.monotonic() - started
        return update.tensors, numbers

    def _trained(self, work: Work, start: Tensors) -> tuple[PreparedUpdate, dict[str, float]] | None:
        """The update and its numbers; with `privacy` None when anything fails, and ``aside`` has the error."""
        try:
            return self._train(work, start)
        except Exception as error:  # with `privacy` an error must not show: it may depend on a row
            if self.site.privacy is None:
                raise
            what = str(error) if isinstance(error, FedSpanError) else place_of(error)
            self.aside = f"noise alone leaves, training failed: {what}"
            log.error("not told to the operator: %s", self.aside, exc_info=error)
        return None

    def _train(self, work: Work, start: Tensors) -> tuple[PreparedUpdate, dict[str, float]]:
        federation = self.federation
        part = Part(self.site, federation, self.model, self._task, self._encoded)
        optimizer, moments = work.optimizer(), work.second_moments()
        keep = federation.strategy.optimizer_state == "keep"
        kept = self.kept if keep else {}
        restore(optimizer, work.mine, kept)
        squares = {} if moments is None else second_moments.among(moments.tensors)
        with self._team.round(
            work.server_round, list(work.parameters), self.train_rows, self._max_batch_size, kept, squares
        ) as ranks:
            if ranks.size > 1:
                part.share(ranks, kept | squares)
            result = part.train(work, optimizer, ranks, self._max_batch_size, self.on_step)
        self._max_batch_size = result.micro_batch
        numbers: dict[str, float] = asdict(result)
        if found := numbers.pop("not_finite"):
            self.aside = f"{found} losses or gradients were not finite and count as zero"
            log.warning("not told to the operator: %s", self.aside)
        update = work.update(optimizer, start)
        self.kept = {name: parameter.detach().cpu().clone() for name, parameter in self._tuned.local.items()}
        if keep:
            self.kept |= capture(optimizer, work.mine)
        return update, numbers

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the state set before; empty when the site has no held-out rows, or shares no metrics.

        Counts by label are left out: they reveal how many patients of a site have a diagnosis.
        """
        if not self.scored_rows:
            return {}
        started, held_out, config = time.monotonic(), self._rows[1], self.federation.evaluation
        if min(config.generate, len(held_out)) < self.site.policy.min_held_out:
            config = config.model_copy(update={"generate": 0})
        device, length = self.model.device, self.federation.training.max_length
        autocast = pick_autocast(self.site.precision, device)
        settings = EvalSettings(config, length, device, self.site.data.system, autocast)
        metrics = self._task.evaluate(self._tuned.model, self.model.base.tokenizer, held_out, settings)
        self._seconds["evaluate"] = time.monotonic() - started
        return {key: value for key, value in metrics.items() if not key.startswith(COUNTS)}

    @property
    def scored_rows(self) -> int:
        """Number of held-out rows that an evaluation scores; 0 when there are none, or the site shares no metrics."""
        return min(len(self._rows[1]), self.federation.evaluation.max_examples) if self.site.shares_metrics else 0

    @property
    def train_rows(self) -> int:
        """Number of the shard's training rows."""
        return len(self._rows[0])

    def seconds(self) -> dict[str, float]:
        """Seconds spent since the last call, by phase."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    @property
    def lora_alpha(self) -> float | None:
        """The federation's LoRA alpha; None when it trains no LoRA."""
        strategy = self.federation.strategy
        return strategy.lora_alpha if strategy.trains == "lora" else None

    @cached_property
    def _team(self) -> Team:
        return Team(self.site, self._site_file, self.federation, self.model.ranks)

    @property
    def _tuned(self) -> Tuned:
        return self.model.tuned

    @property
    def _reach(self) -> Reach:
        return Reach(self.federation, self.train_rows)

    @cached_property
    def _rows(self) -> tuple[list[Row], list[Row]]:
        rows, self._left_out, _ = self._task.rows(self.site.data, self._site_file)
        return split_held_out(rows, self.site.data.held_out)

    @cached_property
    def _encoded(self) -> list[Any]:
        length = self.federation.training.max_length
        return self._task.examples(self.model.base.tokenizer, self._rows[0], self.site.data.system, length)
