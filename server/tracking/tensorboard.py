"""TensorBoard: event files in the run's own folder."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoard:
    """See ``Sink``. Args: folder: where the event files go."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See ``Sink``."""
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)

    def end(self, status: str) -> None:
        """See ``Sink``."""
        del status
        self._writer.close()
