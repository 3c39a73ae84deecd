"""The context of the checks: site file and federation file, and everything made from them, each made once."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from client.preflight.finding import Skip
from client.preflight.memory import Batch
from client.preflight.superlink import anonymous_client
from client.site_model import Digests, digests
from client.superlink.probe import LinkReport, probe
from client.training.settings import held, lora_rank, model_source
from common.config.federation import FederationConfig, ModelConfig
from common.config.section import resolve
from common.config.site import SiteConfig
from common.config.task import TaskConfig
from common.data.rows import Loaded, Row, split_held_out
from common.data.tasks import Task, make_task
from common.errors import FedSpanError
from common.model import tuning
from common.model.base_model import Base

WHOLE = 10**9  # tokens: no row is longer
T = TypeVar("T")
MOST_ROWS = 20_000  # rows that are tokenized; a longer shard is sampled evenly


class _Once(cached_property[T]):
    """A cached property whose error is kept, too: what failed for one check is not tried again for the next."""

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Any:  # noqa: ANN401 - as the base has it
        if instance is None:
            return self
        errors = instance.__dict__.setdefault("_errors", {})
        if self.attrname in errors:
            raise errors[self.attrname]
        try:
            return super().__get__(instance, owner)
        except FedSpanError as error:
            errors[self.attrname] = error
            raise


@dataclass
class CheckContext:
    """A site before it joins; expensive parts are made once, when the first check needs them.

    Attributes:
        site: the site file's content.
        site_file: the site file's path.
        federation: the federation file's content, with absolute paths.
        federation_file: the federation file's path.
        superlink: HOST:PORT of the server.
        root_certificates: PEM file of the CA that signed the server's certificate.
        private_key: file with the SuperNode's private key.
        deadline: longest wait, seconds.
        mbit: speed of the link in Mbit/s, given by the user; None: measured.
        measure: whether to make some training steps.
    """

    site: SiteConfig
    site_file: Path
    federation: FederationConfig | None = None
    federation_file: Path | None = None
    superlink: str | None = None
    root_certificates: Path | None = None
    private_key: Path | None = None
    deadline: float = 60.0
    mbit: float | None = None
    measure: bool = False

    @property
    def settings(self) -> FederationConfig:
        """The federation's settings.

        Raises:
            Skip: no federation file was given.
        """
        if self.federation is None:
            raise Skip("needs --federation")
        return self.federation

    @_Once
    def shard(self) -> Loaded:
        """The loaded shard."""
        return self.task.rows(self.site.data, self.site_file)

    @property
    def rows(self) -> list[Row]:
        """All usable rows of the shard."""
        loaded: Loaded = self.shard
        return loaded.rows

    @cached_property
    def split(self) -> tuple[list[Row], list[Row]]:
        """Rows for training, and rows held out."""
        return split_held_out(self.rows, self.site.data.held_out)

    @cached_property
    def task(self) -> Task[Any]:
        """The learning task.

        Raises:
            Skip: the task is not known.
        """
        folder = self.site.model.path if self.site.model is not None else None
        if self.federation is None and folder is not None:
            kind, writes = _model_kind(resolve(folder, self.site_file) / "config.json")
            if not writes:
                raise Skip(f"needs --federation: what a {kind} model learns, and so how it is read, is said there")
        default: TaskConfig = FederationConfig.model_fields["task"].default
        return make_task(default if self.federation is None else self.federation.task)

    @property
    def source(self) -> tuple[str, str | None]:
        """Folder, or hub id and revision, of the base model."""
        model = self.site.model if self.federation is None else self.federation.model
        if model is None:
            raise Skip("the site file names no `model`; needs --federation")
        return model_source(self.site, self.site_file, model)

    @_Once
    def base(self) -> Base:
        """The base model as the session would load it."""
        source, revision = self.source
        if self.federation is None:
            return self.task.load(source, revision, ModelConfig.model_fields["dtype"].default, 0)
        dtype, seed = self.federation.model.dtype, self.federation.training.seed
        return self.task.load(source, revision, dtype, seed, held(self.site, self.federation))

    @cached_property
    def digests(self) -> Digests:
        """Digests of the base model and of its tokenizer, in the form that server and sites compare."""
        return digests(self.base)

    @cached_property
    def tuned(self) -> tuning.Tuned:
        """The model prepared for training; it takes over the base model's memory."""
        settings, _ = self.settings, self.digests
        return tuning.tune(
            self.base.model,
            settings.strategy,
            self.task.peft_type,
            rank=lora_rank(self.site, settings.strategy),
            seed=settings.training.seed,
        )

    @cached_property
    def examples(self) -> list[Any]:
        """Training rows as tokens, not truncated: all rows, or an even sample of ``MOST_ROWS``."""
        return self._encode(WHOLE)

    @cached_property
    def _cut(self) -> list[Any]:
        """The same rows, truncated as in training."""
        return self._encode(self.settings.training.max_length)

    def _encode(self, length: int) -> list[Any]:
        train = self.split[0]
        some = train[:: math.ceil(len(train) / MOST_ROWS)]
        return self.task.examples(self.base.tokenizer, some, self.site.data.system, length)

    @property
    def tokens(self) -> int:
        """Number of tokens of all training rows, estimated; 0 where examples hold no tokens."""
        if self.task.reads_files:
            return 0
        return sum(len(e.input_ids) for e in self.examples) * len(self.split[0]) // len(self.examples)

    @property
    def steps(self) -> int:
        """Optimizer steps per round."""
        return self.settings.training.steps(len(self.split[0]))

    def largest(self, rows: int) -> Batch:
        """The largest batch with ``rows`` rows that the shard can give."""
        limit = self.settings.training.max_length
        collate = self.task.collater(self.base.tokenizer)
        if self.task.reads_files:
            return Batch(rows, 0, pixels=tuple(collate(self._cut[:1])["pixel_values"].shape[1:]))
        train = sorted(self._cut, key=lambda example: len(example.input_ids))[-rows:]
        width = min(limit, len(train[-1].input_ids))
        return Batch(rows, width, collate(train)["labels"].numel() / (len(train) * width))

    @_Once
    def link(self) -> LinkReport:
        """The report about the server's address; only this method calls ``client.superlink.probe``.

        Raises:
            Skip: no server was given.
            LinkError: the server cannot be reached, or not trusted.
        """
        return probe(*self.server, self.deadline)

    @cached_property
    def upload(self) -> tuple[float, float]:
        """Bytes per second to the server, and seconds that an empty request takes.

        Raises:
            LinkError: the server does not answer in time, or is no SuperLink.
        """
        _ = self.link
        with anonymous_client(*self.server, self.deadline) as somebody:
            return somebody.upload_rate()

    @property
    def server(self) -> tuple[str, Path]:
        """Address and root certificates of the server."""
        if self.superlink is None or self.root_certificates is None:
            raise Skip("needs --superlink and --root-certificates")
        return self.superlink, self.root_certificates


def _model_kind(config: Path) -> tuple[str, bool]:
    """Family in a model folder's configuration, and whether the model writes text; loading it tells more."""
    try:
        told = json.loads(config.read_bytes())
        made_as = " ".join(told.get("architectures") or ["CausalLM"])
        return str(told["model_type"]), any(word in made_as for word in ("CausalLM", "LMHead", "ConditionalGeneration"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "unknown", True
