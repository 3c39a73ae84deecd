"""The updates of a round on disk, until the round closes and admission knows the median norm (decision 010).

On disk, because memory must not grow with the number of updates (decision 008).
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import FederationError
from common.linalg.subspace import projects_right
from common.protocol.tensors import Tensors, flatten, unflatten
from strategies.admission.bounds import UpdateSize, cohort_bound
from strategies.rule import Update

_WHOLE, _LEFT, _RIGHT = "whole", "left", "right"  # groups of tensors; groups of factors end with the term's number


class PendingUpdates:
    """Updates as files in a folder, which is emptied first and removed at the end. Use as a context manager.

    Args:
        folder: the folder, on a disk with room for all updates of a round.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bases: dict[str, Tensors] = {}  # by client and tensor, where all sites share the basis of their round
        self._kept: dict[
            str, tuple[Path, Update]
        ] = {}  # by client: file of the tensors, and the update without tensors
        self._sizes: dict[str, UpdateSize] = {}  # by client, those of refused updates too

    def __enter__(self) -> "PendingUpdates":
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a server that was killed
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, update: Update, size: UpdateSize) -> None:
        """Write an update of this size to disk.

        Raises:
            FederationError: the update cannot be written, e.g. on a full disk.
        """
        file = self._folder / f"{len(self._sizes)}.safetensors"
        groups: dict[str, Tensors] = {_WHOLE: dict(update.tensors)}
        for name, factors in update.factors.items():
            for number, (left, right) in enumerate(factors.terms):
                pair = {_LEFT: left, _RIGHT: right}
                if factors.common:  # all updates of a version have the same basis in memory
                    basis = _RIGHT if projects_right((len(left), right.shape[1])) else _LEFT
                    self._bases.setdefault(update.client, {})[name] = pair.pop(basis)
                for side, factor in pair.items():
                    groups.setdefault(f"{side}{number}", {})[name] = factor
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in flatten(groups).items()}, file)
        except (OSError, SafetensorError) as error:
            raise FederationError(f"{update.client}: its update cannot be kept in {self._folder}: {error}") from None
        factors_alone = {name: replace(factors, terms=[]) for name, factors in update.factors.items()}
        self._kept[update.client] = file, replace(update, tensors={}, factors=factors_alone)
        self._sizes[update.client] = size

    def refuse_beyond(self, ratio: float) -> dict[str, str]:
        """Remove the updates that are longer than ``ratio`` times the median of all; the reasons, by client."""
        bound, refused = cohort_bound({client: size.signal for client, size in self._sizes.items()}, ratio), {}
        for client in sorted(self._kept):
            size = self._sizes[client]
            if size.norm <= bound + size.noise:
                continue
            limit = f"allowed: {bound:.3g}, {ratio:g} times the round's median"
            limit += f", and {size.noise:.3g} for the declared noise" if size.noise else ""
            refused[client] = f"{client}: its update moved by {size.norm:.3g}; {limit}"
            self._kept.pop(client)[0].unlink(missing_ok=True)
        return refused

    def updates(self) -> Iterator[Update]:
        """All updates, sorted by the clients' names; tensors are memory-mapped and read as they are used."""
        for _, (file, update) in sorted(self._kept.items()):
            yield _loaded(file, update, self._bases.get(update.client, {}))


def _loaded(file: Path, update: Update, bases: Tensors) -> Update:
    """The update with its tensors."""
    groups = unflatten(load_file(file))
    factors = {name: replace(one, terms=[]) for name, one in update.factors.items()}
    for name, one in factors.items():
        for number in count():
            left, right = (groups.get(f"{side}{number}", {}).get(name) for side in (_LEFT, _RIGHT))
            if left is None and right is None:
                break
            one.terms.append((bases[name] if left is None else left, bases[name] if right is None else right))
    return replace(update, tensors=groups.get(_WHOLE, {}), factors=factors)
