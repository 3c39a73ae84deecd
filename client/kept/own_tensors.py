"""A site's own tensors on its disk: those that it trains and never sends (a local head, own factors, moments).

They outlive the site's processes and a resumed run's server. They hold what the rows have taught, so they are for this
account alone.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common.errors import TrainingError
from common.protocol.tensors import Tensors
from common.system.files import make_private, write_atomically

_BEFORE = 2  # rounds whose tensors are kept: a round that is repeated starts from those of the round before


class OwnTensors:
    """The own tensors in one run, by round.

    Args:
        folder: the folder of a federation.
        run: the run; the tensors of another are removed when the first ones of this run are written.
    """

    def __init__(self, folder: Path, run: str | None) -> None:
        self._folder, self._run = folder, (run or "")[:16]

    def after(self, server_round: int) -> Tensors:
        """The tensors after a round's training, or after the last one before it; empty when there are none.

        Raises:
            TrainingError: they cannot be read.
        """
        file = max((file for file in self._files() if self._round(file) <= server_round), default=None)
        try:
            return {} if file is None else load_file(file)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"the site's own tensors cannot be read: {file} ({error})") from None

    def keep(self, server_round: int, tensors: Tensors, best: int | None = None) -> None:
        """Write the tensors after a round's training, and remove those that no round will start from.

        Args:
            server_round: the round, from 1.
            tensors: the tensors by name.
            best: the best round so far, whose tensors are kept, too.

        Raises:
            TrainingError: they cannot be written.
        """
        if not tensors:
            return
        try:
            make_private(self._folder)
            content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            write_atomically(self._file(server_round), content, 0o600)
        except OSError as error:
            raise TrainingError(f"the site's own tensors cannot be kept: {error}") from None
        # A site that did not train in the best round has its tensors from a round before.
        until = [file for file in self._files() if best is not None and self._round(file) <= best]
        wanted = {*until[-1:]}
        earlier = [file for file in self._files() if file not in wanted and self._round(file) <= server_round]
        wanted |= {*earlier[-_BEFORE:]}
        for file in self._folder.glob("*.safetensors"):
            if file not in wanted:
                file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._run}-round-*.safetensors"))

    def _file(self, server_round: int) -> Path:
        return self._folder / f"{self._run}-round-{server_round:06}.safetensors"

    def _round(self, file: Path) -> int:
        return int(file.stem.rpartition("-")[2])
