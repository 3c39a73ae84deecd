"""The updates of a round on disk, until it is known which of them count: memory does not grow with their number."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import FederationError
from common.protocol.factors import Factors
from strategies.rule import Update

_LEFT, _RIGHT = "left", "right"


@dataclass
class _Kept:
    """What of an update is not in its file."""

    file: Path
    num_examples: int
    lora_alpha: float | None
    factors: dict[str, tuple[float, bool]] = field(default_factory=dict)  # name -> (decay, common)


class Spool:
    """Updates in files of a folder, which is emptied first and removed at the end. Use as a context manager.

    Args:
        folder: on a disk that holds a round's updates.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, _Kept] = {}

    def __enter__(self) -> "Spool":
        shutil.rmtree(self._folder, ignore_errors=True)  # of a server that was killed
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, update: Update) -> None:
        """Write an update down.

        Raises:
            FederationError: the disk does not take it.
        """
        file = self._folder / f"{len(self._kept)}.safetensors"
        kept = _Kept(file, update.num_examples, update.lora_alpha)
        tensors = {name: tensor.contiguous() for name, tensor in update.tensors.items()}
        for name, factors in update.factors.items():
            kept.factors[name] = (factors.decay, factors.common)
            for number, (left, right) in enumerate(factors.terms):
                tensors[f"{name}|{number}|{_LEFT}"] = left.contiguous()
                tensors[f"{name}|{number}|{_RIGHT}"] = right.contiguous()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            raise FederationError(f"{update.client}: its update cannot be kept in {self._folder}: {error}") from None
        self._kept[update.client] = kept

    def updates(self) -> Iterator[Update]:
        """All updates, by the clients' names; each is read from its file as its tensors are used."""
        for client in sorted(self._kept):
            kept = self._kept[client]
            yield _loaded(client, kept)


def _loaded(client: str, kept: _Kept) -> Update:
    tensors = load_file(kept.file)
    factors = {name: _factors(tensors, name, *facts) for name, facts in kept.factors.items()}
    return Update(client, kept.num_examples, tensors, kept.lora_alpha, factors)


def _factors(tensors: dict[str, Tensor], name: str, decay: float, common: bool) -> Factors:
    terms: list[tuple[Tensor, Tensor]] = []
    while (left := tensors.pop(f"{name}|{len(terms)}|{_LEFT}", None)) is not None:
        terms.append((left, tensors.pop(f"{name}|{len(terms)}|{_RIGHT}")))
    return Factors(decay, terms, common)
