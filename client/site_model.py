"""A site's model in one federation: the base model as it was read, what of it is trained, and the weights it holds.

Sites that share a process read a base model from disk once, and what no site changes is in memory once.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.held_weights import Weights
from client.reach import Known
from client.training.settings import lora_rank, model_source, pick_device
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.data.tasks import Task
from common.errors import ModelError
from common.model import tuning
from common.model.adapters import cut
from common.model.base_model import Base
from common.protocol.digest import base_digest, tokenizer_digest
from common.protocol.factors import Exchange

Digests = tuple[str, str]  # of a base model, and of its tokenizer
Read = Callable[[], Base]  # from disk


class Bases:
    """The base models that were read, as they are on disk; the first who asks for one reads it."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Base, Digests]] = {}

    def view(self, key: str, read: Read) -> Base:
        """The base model of ``key``: modules of the taker's own, weights that all takers share.

        Before a weight is changed it must be taken apart with `own`.
        """
        base, _ = self._get(key, read)
        shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in base.model.parameters()}
        return replace(base, model=copy.deepcopy(base.model, shared))

    def digests(self, key: str, read: Read) -> Digests:
        """Of the base model of ``key``."""
        return self._get(key, read)[1]

    def _get(self, key: str, read: Read) -> tuple[Base, Digests]:
        if key not in self._known:
            base = read()
            self._known[key] = base, digests(base)
        return self._known[key]


def own(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters memory that nobody shares."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def digests(base: Base) -> Digests:
    """Of a base model that is as it was read."""
    return base_digest(base.model), tokenizer_digest(base.tokenizer)


class SiteModel:
    """Made when it is first asked for, and once.

    Args:
        site: the site file's content.
        site_file: where it lies; its relative paths are relative to it.
        federation: the federation file's content.
        task: what is learned.
        bases: of the sites that share this process; None: this one is alone.
        seconds: where it notes how long it took to ``load``.
    """

    def __init__(
        self,
        site: SiteConfig,
        site_file: Path,
        federation: FederationConfig,
        task: Task[Any],
        bases: Bases | None,
        seconds: dict[str, float],
    ) -> None:
        self._site, self._federation, self._task = site, federation, task
        self._source = model_source(site, site_file, federation.model)
        self._bases, self._seconds = bases, seconds
        self._key = f"{self._source} {federation.model_dump_json()}"  # what the base model depends on

    @cached_property
    def device(self) -> torch.device:
        """Where it is trained."""
        return pick_device(self._site.device)

    @property
    def rank(self) -> int:
        """With which the site trains."""
        return lora_rank(self._site, self._federation.strategy)

    @cached_property
    def base(self) -> Base:
        """The base model and its tokenizer."""
        started = time.monotonic()
        base = self._read() if self._bases is None else self._bases.view(self._key, self._read)
        self._seconds["load"] = time.monotonic() - started
        return base

    @cached_property
    def digests(self) -> Digests:
        """Of the base model as it is on disk, and of its tokenizer.

        Raises:
            ModelError: they are not those that the federation file names.
        """
        if self._bases is None and "tuned" in self.__dict__:  # it is not any more what was loaded
            self.start_anew()
        found = digests(self.base) if self._bases is None else self._bases.digests(self._key, self._read)
        if (wrong := self._federation.model.difference(*found)) is not None:
            raise ModelError(f"{self._site.name}: {wrong}")
        return found

    @cached_property
    def tuned(self) -> tuning.Tuned:
        """What of it is trained, on the device."""
        seed = self._federation.training.seed
        tuned = tuning.tune(self.base.model, self._federation.strategy, self._task.peft_type, rank=self.rank, seed=seed)
        tuned.model.to(self.device)
        if self._bases is not None:
            own((tuned.parameters | tuned.local).values())
        return tuned

    @cached_property
    def weights(self) -> Weights:
        """The federation's tensors, where base weights are among them, and which version they are."""
        base = tuning.first_state(self.tuned, self._federation.strategy, self._federation.training.seed)
        return Weights(base, self.exchange)

    @cached_property
    def known(self) -> Known:
        """The federation's tensors where no base weight is among them; asked for before any is written."""
        return Known(self.tuned.get())

    @property
    def exchanged(self) -> Mapping[str, Tensor]:
        """The federation's tensors, in this site's rank: as they are in the model, or as they are held beside it."""
        if self._federation.strategy.changes_base:
            return cut(self.weights.tensors, self.rank)
        return self.tuned.parameters

    def exchange(self, server_round: int) -> Exchange:
        """How changes of base weights travel in factors in a round."""
        return self._federation.strategy.exchange(self._federation.training.seed, server_round)

    def start_anew(self) -> None:
        """Back to the base model."""
        for made in ("base", "tuned", "weights", "known"):
            self.__dict__.pop(made, None)

    def _read(self) -> Base:
        source, revision = self._source
        return self._task.load(source, revision, self._federation.model.dtype, self._federation.training.seed)
