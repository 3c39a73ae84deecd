"""The updates of a round on disk, until it is known which of them count: memory does not grow with their number."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import FederationError
from common.protocol.tensors import Tensors, flatten, unflatten
from strategies.rule import Update

_WHOLE, _LEFT, _RIGHT = "whole", "left", "right"  # groups of tensors; of factors with the term's number


class PendingUpdates:
    """Updates in files of a folder, which is emptied first and removed at the end. Use as a context manager.

    Args:
        folder: on a disk that holds a round's updates.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, tuple[Path, Update]] = {}  # by client; of the update all but its tensors

    def __enter__(self) -> "PendingUpdates":
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
        groups: dict[str, Tensors] = {_WHOLE: dict(update.tensors)}
        for name, factors in update.factors.items():
            for number, (left, right) in enumerate(factors.terms):
                groups.setdefault(f"{_LEFT}{number}", {})[name] = left
                groups.setdefault(f"{_RIGHT}{number}", {})[name] = right
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in flatten(groups).items()}, file)
        except (OSError, SafetensorError) as error:
            raise FederationError(f"{update.client}: its update cannot be kept in {self._folder}: {error}") from None
        factors_alone = {name: replace(factors, terms=[]) for name, factors in update.factors.items()}
        self._kept[update.client] = file, replace(update, tensors={}, factors=factors_alone)

    def updates(self) -> Iterator[Update]:
        """All updates, by the clients' names; each is read from its file as its tensors are used."""
        for _, (file, update) in sorted(self._kept.items()):
            yield _loaded(file, update)


def _loaded(file: Path, update: Update) -> Update:
    """The update with its tensors."""
    groups, number = unflatten(load_file(file)), 0
    factors = {name: replace(one, terms=[]) for name, one in update.factors.items()}
    while lefts := groups.get(f"{_LEFT}{number}"):
        for name, left in lefts.items():
            factors[name].terms.append((left, groups[f"{_RIGHT}{number}"][name]))
        number += 1
    return replace(update, tensors=groups.get(_WHOLE, {}), factors=factors)
