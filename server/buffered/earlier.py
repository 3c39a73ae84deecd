"""States that slow sites still train from, on disk until their updates have come."""

import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import FederationError
from strategies.rule import Tensors


class EarlierStates:
    """States as files in a folder, which is emptied first: after a crash all work is given anew.

    On disk, because memory must not grow with the number of states (decision 008).

    Args:
        folder: the folder, on a disk with room for one state more than ``cohort.max_age``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.clear()

    def store(self, number: int, state: Tensors) -> Tensors:
        """Write the state that round ``number`` started from; the result is memory-mapped and read as it is used.

        Raises:
            FederationError: it cannot be written, e.g. on a full disk.
        """
        file = self._file(number)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise FederationError(f"round {number}: its first state cannot be kept in {file}: {error}") from None

    def keep(self, numbers: Collection[int]) -> None:
        """Remove all states but those of the given rounds."""
        wanted = {self._file(number) for number in numbers}
        for file in self._folder.glob("*.safetensors"):
            if file not in wanted:
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all states, and the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:06}.safetensors"
