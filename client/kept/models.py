"""A federation's models in the site's folder (`keep`), and the states that may yet be the best round's.

delivered.json     which run and round each model is of
model/             the last round's; or best/, or round-NNN/ of each
personal/          with what the site has trained for itself
.held/             states of rounds that are not judged yet
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.config.site import MARK
from common.model.finished import files_digest
from common.protocol.tensors import Tensors
from common.system.files import built, read_object, write_atomically

log = logging.getLogger("site")


class KeptModels:
    """The models of one federation at a site.

    Args:
        folder: the federation's folder; it is made with the first model.
        run: the run; its first model replaces those of an earlier one.

    Attributes:
        base: the base model's folder on this machine, which is noted for those who use an adapter; None: not known.
    """

    def __init__(self, folder: Path, run: str | None) -> None:
        self.folder, self._run, self._held = folder, run, folder / ".held"
        self.base: Path | None = None

    def digest(self, name: str, trained_digest: str) -> str | None:
        """Digest of all files of a model that is there already, whole; None: it is to be written.

        Args:
            name: name of the model's folder.
            trained_digest: digest of the trained tensors that the model is to have.
        """
        told = self._told().get(name, {})
        if told.get("trained") != trained_digest or not (self.folder / name).is_dir():
            return None
        found = files_digest(self.folder / name)
        return found if found == told.get("files") else None

    def write(self, name: str, server_round: int, trained_digest: str, make: Callable[[Path], None]) -> str:
        """Write a model, and note it; returns the digest of its files.

        Args:
            name: name of the model's folder.
            server_round: the round that made the model.
            trained_digest: digest of its trained tensors.
            make: writes the folder, complete or not at all.

        Raises:
            OSError: it cannot be written; an older one is unchanged.
        """
        self._begin()
        before, now = read_object(self.folder / MARK), self._told()
        make(self.folder / name)
        digest = files_digest(self.folder / name)
        self._write_note({**now, name: {"round": server_round, "trained": trained_digest, "files": digest}})
        for old in before.get("models", {}).keys() - now.keys() - {name}:
            log.warning("the model of an earlier run in %s is removed", self.folder / old)
            shutil.rmtree(self.folder / old, ignore_errors=True)
        return digest

    def hold(self, server_round: int, tensors: Tensors, best: int | None) -> None:
        """Hold the state after a round until it is judged, and let go of all others but the best one.

        Raises:
            OSError: it cannot be written.
        """
        final = self._held / f"round-{server_round:06}"
        self._begin()
        with built(final) as new:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / "state.safetensors")
        for old in self._held.glob("round-*"):
            if int(old.name.rpartition("-")[2]) not in (server_round, best):
                shutil.rmtree(old, ignore_errors=True)

    def held(self, server_round: int) -> Tensors | None:
        """The state after a round; None when it is not held."""
        try:
            return load_file(self._held / f"round-{server_round:06}" / "state.safetensors")
        except (OSError, SafetensorError):
            return None

    def let_go(self) -> None:
        """Let go of all held states: the run has ended."""
        shutil.rmtree(self._held, ignore_errors=True)

    def _begin(self) -> None:
        """Make the federation's folder, if it is not there; one that holds something else is left alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MARK).exists():
            if any(self.folder.iterdir()):
                raise FileExistsError(0, "its folder holds something else; move that away")
            self._write_note({})

    def _told(self) -> dict[str, Any]:
        """The models of this run."""
        note = read_object(self.folder / MARK)
        return dict(note.get("models", {})) if note.get("run") == self._run else {}

    def _write_note(self, models: dict[str, Any]) -> None:
        told = {"run": self._run, "base": self.base and str(self.base), "models": models}
        write_atomically(self.folder / MARK, json.dumps(told, indent=2) + "\n")
