"""A site's model in one federation: the base model, its trained tensors, and the federation's weights.

Sites that share a process read a base model from disk once, and share the memory of all weights that no site changes.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.held_weights import Weights
from client.reach import Known
from client.training.settings import held, lora_rank, model_source, pick_autocast, pick_devices, state_bytes
from client.training.split import Places, free_bytes, places, split
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.config.strategy import StrategyConfig
from common.data.packing import Packing, choose
from common.data.tasks import Task
from common.errors import ModelError
from common.model import tuning
from common.model.adapters import cut
from common.model.base_model import Base, check_length, read_again
from common.model.finished import About, source_folder, write_model
from common.model.quantization import WHOLE, Held, quantized_layers, whole_sizes
from common.protocol.digest import base_digest, tokenizer_digest
from common.protocol.factors import Exchange

Digests = tuple[str, str]  # digests (hex) of a base model and of its tokenizer
Read = Callable[[], Base]  # reads a base model from disk


class Bases:
    """Base models that the sites of a process share; each is read from disk at its first use."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Base, Digests]] = {}

    def view(self, key: str, read: Read) -> Base:
        """The base model of ``key``, with new modules whose parameters share the memory of all views.

        A site must call `unshare` before it changes a parameter.
        """
        base, _ = self._get(key, read)
        shared: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in base.model.parameters()}
        for _, layer in quantized_layers(base.model):  # nobody changes codes
            shared |= {id(codes): codes for codes in layer.buffers()}
        return replace(base, model=copy.deepcopy(base.model, shared))

    def digests(self, key: str, read: Read) -> Digests:
        """Digests of the base model of ``key``."""
        return self._get(key, read)[1]

    def _get(self, key: str, read: Read) -> tuple[Base, Digests]:
        if key not in self._known:
            base = read()
            self._known[key] = base, digests(base)
        return self._known[key]


def unshare(parameters: Iterable[nn.Parameter]) -> None:
    """Copy parameters, so that training one site does not change the model of another in this process."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def digests(base: Base) -> Digests:
    """Digests of a base model; call before training changes it."""
    return base_digest(base.model), tokenizer_digest(base.tokenizer)


def written_bytes(tuned: tuning.Tuned, strategy: StrategyConfig, rank: int) -> int:
    """Bytes of one model that a site keeps, without its tokenizer; ``rank``: that of the site."""
    if strategy.trains == "weights" or strategy.changes_base:
        return sum(number * size for number, size in whole_sizes(tuned.model))
    return sum(p.nbytes for p in (tuned.parameters | tuned.local).values()) * strategy.rank // rank


def places_of(
    tuned: tuning.Tuned, federation: FederationConfig, devices: Sequence[torch.device], room: Sequence[int]
) -> Places:
    """Where the parts of a split model are to be; ``room``: bytes that each device has.

    Raises:
        ModelError: the model has fewer blocks than there are devices.
    """
    strategy, training = federation.strategy, federation.training
    trained = (tuned.parameters | tuned.local).items()
    beside = {id(tensor): state_bytes(name, tensor, strategy, training) for name, tensor in trained}
    return places(tuned.model, devices, room, beside)


class SiteModel:
    """A site's model; each part is made once, at its first use.

    Args:
        site: the site file's content.
        site_file: the site file's path, which relative paths refer to.
        federation: the federation's settings.
        task: the learning task.
        bases: base models that the sites of this process share; None: this process has one site.
        seconds: receives the duration of loading as ``load``.
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
        # everything that the base model depends on
        self._key = f"{self._source} {site.quantization} {federation.model_dump_json()}"

    @cached_property
    def devices(self) -> list[torch.device]:
        """The devices for training."""
        return pick_devices(self._site, self._federation.training.rows_per_step)

    @property
    def device(self) -> torch.device:
        """The device of this process; the first, where the model is split."""
        return self.devices[0]

    @property
    def ranks(self) -> list[torch.device]:
        """The device of every copy of the model."""
        return self.devices[:1] if self._site.split else self.devices

    @property
    def held(self) -> Held:
        """How the site holds the base model."""
        return held(self._site, self._federation)

    @property
    def rank(self) -> int:
        """The LoRA rank that the site trains with."""
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
        """Digests of the base model on disk, and of its tokenizer.

        Raises:
            ModelError: the digests are not those in the federation file.
        """
        if self._bases is None and "tuned" in self.__dict__:  # training has changed the loaded model (decision 011)
            self.start_anew()
        found = digests(self.base) if self._bases is None else self._bases.digests(self._key, self._read)
        if (wrong := self._federation.model.difference(*found)) is not None:
            raise ModelError(f"{self._site.name}: {wrong}")
        return found

    @cached_property
    def tuned(self) -> tuning.Tuned:
        """The model on the device, or split over several, with its trained tensors."""
        tuned = self._tune(self.base)
        if len(self.ranks) < len(self.devices):
            split(tuned.model, places_of(tuned, self._federation, self.devices, free_bytes(self.devices)))
        else:
            tuned.model.to(self.device)
        self._local = {name: parameter.detach().cpu().clone() for name, parameter in tuned.local.items()}
        if self._bases is not None:
            unshare((tuned.parameters | tuned.local).values())
        return tuned

    def check(self) -> None:
        """Hold the model against the federation's section ``training``.

        Raises:
            ModelError: rows are longer than the model's positions, or it cannot pack rows and must.
        """
        check_length(self.base.model, self._federation.training.max_length)
        if self._federation.training.packing == "on":
            _ = self.packing

    @cached_property
    def packing(self) -> Packing | None:
        """How rows of one forward pass are packed; None: they are padded."""
        autocast = pick_autocast(self._site.precision, self.device)
        return choose(self.tuned.model, self._federation.training.packing, autocast, packs=self._task.packs)

    @property
    def source(self) -> Path | None:
        """The base model's folder on this machine."""
        return source_folder(*self._source)

    def set_local(self, kept: Mapping[str, Tensor]) -> None:
        """Write the site's own parameters, such as a local head, into the model; those not in ``kept`` as at first."""
        with torch.no_grad():
            for name, parameter in self.tuned.local.items():
                parameter.copy_(kept.get(name, self._local[name]))

    @property
    def is_cut(self) -> bool:
        """Whether the site trains with a smaller rank than the federation's."""
        return self.rank != self._federation.strategy.rank

    @property
    def written_bytes(self) -> int:
        """Bytes of one model that the site keeps."""
        return written_bytes(self.tuned, self._federation.strategy, self.rank)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], about: About, own: Mapping[str, Tensor]) -> None:
        """Write a model to keep; afterwards the model in memory is in no certain state.

        Args:
            folder: the folder, which appears complete or not at all.
            tensors: the federation's tensors.
            about: how the model is used, and its card.
            own: the site's own parameters; those that are missing are written as at first.

        Raises:
            OSError: it cannot be written.
            ModelError: whole weights are needed, which are read anew, and are no longer those that training began with.
        """
        tuned = self.tuned if about.card.form == "adapter" else self._whole()
        mine = {name: own.get(name, first) for name, first in self._local.items()}
        write_model(folder, tuned, {**tensors, **mine}, self.base.tokenizer, about.use, about.card, self.source)

    @cached_property
    def weights(self) -> Weights:
        """The federation's weights and their version, for strategies that change base weights."""
        base = tuning.first_state(self.tuned, self._federation.strategy, self._federation.training.seed)
        return Weights(base, self.exchange)

    @cached_property
    def known(self) -> Known:
        """The known states, for strategies that change no base weight; use before a state is written."""
        return Known(self.tuned.get())

    @property
    def exchanged(self) -> Mapping[str, Tensor]:
        """The federation's tensors in this site's rank: those of ``weights``, or the model's parameters."""
        if self._federation.strategy.changes_base:
            return cut(self.weights.tensors, self.rank)
        return self.tuned.parameters

    def exchange(self, server_round: int) -> Exchange:
        """The form in which a round's factors are sent."""
        return self._federation.strategy.exchange(self._federation.training.seed, server_round)

    def start_anew(self) -> None:
        """Drop all trained tensors: the next use loads the base model again."""
        for made in ("base", "tuned", "weights", "known"):
            self.__dict__.pop(made, None)

    def _tune(self, base: Base) -> tuning.Tuned:
        seed = self._federation.training.seed
        return tuning.tune(base.model, self._federation.strategy, self._task.peft_type, rank=self.rank, seed=seed)

    def _read(self) -> Base:
        return self._load(self.held)

    def _load(self, how: Held) -> Base:
        federation = self._federation
        return self._task.load(*self._source, federation.model.dtype, federation.training.seed, how)

    def _whole(self) -> tuning.Tuned:
        """The model with whole weights, from its files where they are held in codes here."""
        if self.held.quantization == "whole":
            return self.tuned
        digest, _ = self.digests[0], self.tuned  # which gives the first values of the site's own parameters
        return self._tune(read_again(lambda: self._load(WHOLE), digest))
