"""Exchanges between the processes of a site's devices in a step of training (decision 037). No Flower.

Every device has a process, its *rank*, and a copy of the model. A step's rows are dealt out to the ranks. Numbers
travel over gloo, on the loopback interface; tensors on CUDA devices over NCCL.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.errors import WorkerDied

T = TypeVar("T")


class Ranks:
    """The ranks, as one of them sees them; here it is alone, and every exchange gives back what it gets.

    Args:
        devices: the device of every rank.
        rank: which of them this process is.

    Example:
        >>> alone = Ranks([torch.device("cpu")])
        >>> alone.mine([3, 1, 2]), alone.gather([0.5])
        ([3, 1, 2], [[0.5]])
    """

    def __init__(self, devices: Sequence[torch.device], rank: int = 0) -> None:
        self.devices, self.rank = tuple(devices), rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.devices)

    def mine(self, rows: Sequence[T]) -> list[T]:
        """This rank's part of a step's rows."""
        return list(rows[self.rank :: self.size])

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank; all give the same count."""
        return [list(numbers)]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""

    def sum_at_first(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks at rank 0, and by zeros at all others."""

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by rank 0's."""


class Connected(Ranks):
    """Several ranks, each in a process of its own.

    Args:
        meeting: a file in a folder that no other account may enter, through which the ranks find each other.
        devices: as above.
        rank: as above.
        deadline: longest wait for another rank, seconds.

    Raises:
        WorkerDied: another rank does not come within the deadline; all methods raise it when another rank is lost.
    """

    def __init__(self, meeting: Path, devices: Sequence[torch.device], rank: int, deadline: float) -> None:
        super().__init__(devices, rank)
        self._groups: dict[str, Any] = {}
        self._answered(lambda: self._meet(meeting, timedelta(seconds=deadline)))

    def _meet(self, meeting: Path, deadline: timedelta) -> None:
        from torch._C._distributed_c10d import FileStore, PrefixStore, ProcessGroupGloo

        store = FileStore(str(meeting), self.size)
        store.set_timeout(deadline)
        # Not by the host's name, which would have other machines listened to.
        gloo: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices, gloo._timeout = [ProcessGroupGloo.create_device(hostname="127.0.0.1")], deadline
        self._groups["cpu"] = ProcessGroupGloo(PrefixStore("cpu", store), self.rank, self.size, gloo)
        if self.devices[self.rank].type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            nccl = ProcessGroupNCCL.Options()
            nccl._timeout = deadline
            self._groups["cuda"] = ProcessGroupNCCL(PrefixStore("cuda", store), self.rank, self.size, nccl)

    def close(self) -> None:
        """Give up: an exchange under way ends with an error, as when another rank's process has died."""
        for group in self._groups.values():
            group.abort()

    def abandon(self) -> None:
        """End an exchange under way on CUDA devices, which would not notice another rank's death."""
        if "cuda" in self._groups:
            self._groups["cuda"].abort()

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As above."""
        mine = torch.tensor(list(numbers), dtype=torch.float64)
        each = [torch.empty_like(mine) for _ in self.devices]
        self._answered(lambda: self._groups["cpu"].allgather([each], [mine]).wait())
        return [found.tolist() for found in each]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """As above; all are under way at a time."""
        self._each(tensors, lambda group, tensor: group.allreduce([tensor]))

    def sum_at_first(self, tensor: Tensor) -> None:
        """As above."""
        self._each([tensor], lambda group, tensor: group.reduce(tensor, 0))
        if self.rank:
            tensor.zero_()

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """As above."""
        self._each(tensors, lambda group, tensor: group.broadcast(tensor, 0))

    def _each(self, tensors: Sequence[Tensor], start: Callable[[Any, Tensor], Any]) -> None:
        def exchange() -> None:
            for work in [start(self._groups[tensor.device.type], tensor) for tensor in tensors]:
                work.wait()

        self._answered(exchange)

    def _answered(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # from gloo, NCCL or the meeting; its text names no row
            if isinstance(error, torch.OutOfMemoryError):
                raise
            lines = str(error).splitlines() or [type(error).__name__]
            raise WorkerDied(f"rank {self.rank} has lost the others: {lines[0][:200]}") from None
