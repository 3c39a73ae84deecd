"""Rank 0's side: starts a process for every other device of the site, and says why one of them has failed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from client.training.ranks import Connected, Ranks
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.errors import AT_A_SITE, DataError, FedSpanError, TrainingError, WorkerDied
from common.protocol.tensors import Tensors
from common.system import logs

DEVICE_BYTES = "FEDSPAN_DEVICE_BYTES"  # environment variable for the worker's supervisor: CUDA memory of other ranks
#: Takes search path and settings from standard input, so that a rank runs the code that this process does: a bundle's.
_PROGRAM = """import json, sys
handed = json.loads(sys.stdin.readline())
sys.path[:] = handed["path"]
from client.rank import serve
serve(handed)
"""
_GRACE = 10.0  # seconds until a rank that has failed has said so


class Team:
    """The devices of a site in one federation. Ranks are started for the first round, and again after a failure.

    Args:
        site: the site file's content.
        site_file: the site file's path.
        federation: the federation's settings.
        devices: the site's devices; the first is that of this process.
    """

    def __init__(
        self, site: SiteConfig, site_file: Path, federation: FederationConfig, devices: list[torch.device]
    ) -> None:
        self._site, self._site_file, self._federation, self._devices = site, site_file, federation, devices
        self._others: list[_Other] = []
        self._ranks: Connected | None = None
        self._folder = ""
        self._end: Callable[[], object] = lambda: None

    @contextlib.contextmanager
    def round(
        self, number: int, active: list[str], rows: int, max_batch_size: int | None, kept: Tensors, moments: Tensors
    ) -> Iterator[Ranks]:
        """All ranks, announced a round; the block must do rank 0's part of it.

        Args:
            number: the round, from 1.
            active: names of the tensors that the round trains.
            rows: number of training rows, which every rank must have read.
            max_batch_size: rows per forward pass.
            kept: the optimizer's state to go on with, on the CPU.
            moments: second moments to start with, on the CPU.

        Raises:
            WorkerDied: a rank's process has ended, or does not answer within the site's deadline.
            FedSpanError: a rank's own error.
        """
        if len(self._devices) == 1:
            yield Ranks(self._devices)
            return
        threads = torch.get_num_threads()
        try:
            if self._ranks is None:
                self._start(rows)
            command = {"round": number, "active": active, "max_batch_size": max_batch_size}
            command |= {"kept": _described(kept), "moments": _described(moments)}
            for other in self._others:
                other.hand(command)
            if self._ranks is None:
                self._ranks = Connected(Path(self._folder) / "meeting", self._devices, 0, self._site.device_deadline)
            if self._devices[0].type == "cpu":
                torch.set_num_threads(self._threads)
            yield self._ranks
            os.environ[DEVICE_BYTES] = str(sum(int(str(other.told("done"))) for other in self._others))
        except WorkerDied as error:
            reason = self._reason(error)
            self.stop()
            raise reason from None
        except BaseException:
            self.stop()
            raise
        finally:
            torch.set_num_threads(threads)

    @property
    def _threads(self) -> int:
        """Number of threads on a CPU, for each rank."""
        return max(1, torch.get_num_threads() // len(self._devices))

    def _start(self, rows: int) -> None:
        self.stop()
        self._folder = tempfile.mkdtemp(prefix="fedspan-ranks-")  # no other account may enter it
        handed: dict[str, Any] = {
            "path": sys.path,
            "devices": [str(device) for device in self._devices],
            "threads": self._threads,
            "meeting": str(Path(self._folder) / "meeting"),
            "deadline": self._site.device_deadline,
            "site_file": str(self._site_file),
            "federation": self._federation.model_dump_json(),
        }
        self._end = weakref.finalize(self, _stop, self._others, self._folder)
        team = weakref.ref(self)  # a thread must not keep the team, and so its processes, alive

        def ended() -> None:
            if (still := team()) is not None and still._ranks is not None:
                still._ranks.abandon()

        for rank, device in enumerate(self._devices[1:], start=1):
            own = self._site.model_copy(update={"device": str(device), "devices": 1})
            self._others.append(_Other(rank, device, {**handed, "rank": rank, "site": own.model_dump_json()}, ended))
        for other in self._others:
            if (has := other.told("ready")) != rows:
                raise DataError(f"{other.name} has read {has} training rows, not {rows}: the shard has changed")

    def _reason(self, lost: WorkerDied) -> FedSpanError:
        """Why an exchange has failed: the first rank's own error, else a death, else the rank that is silent."""
        until = time.monotonic() + _GRACE
        return min((other.failure(until) for other in self._others), key=lambda found: found[0], default=(0, lost))[1]

    def stop(self) -> None:
        """End all other ranks' processes."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        self._end()
        self._others = []
        os.environ.pop(DEVICE_BYTES, None)


class _Other:
    """Another rank's process."""

    def __init__(self, rank: int, device: torch.device, handed: dict[str, Any], ended: Callable[[], object]) -> None:
        self._deadline = handed["deadline"]
        self.name = f"the process of {device} (rank {rank})"
        read, write = os.pipe()
        ours = logs.descriptor()
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stderr=ours,
            pass_fds=[write],
            text=True,
        )
        os.close(write)
        self._reports: SimpleQueue[dict[str, Any]] = SimpleQueue()
        threading.Thread(target=_read, args=(read, self.process, self._reports, ended), daemon=True).start()
        self.hand({**handed, "tell": write, "aside": ours != 2})

    def hand(self, line: dict[str, Any]) -> None:
        """Give the process a line: its settings, later a round."""
        assert self.process.stdin is not None  # noqa: S101 - opened above
        with contextlib.suppress(BrokenPipeError):  # its death is reported
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def told(self, what: str) -> object:
        """The report that comes next.

        Raises:
            WorkerDied: the process has ended, or there is no report within the deadline.
            FedSpanError: the rank's own error.
        """
        try:
            report = self._reports.get(timeout=self._deadline)
        except Empty:
            raise WorkerDied(f"{self.name} has not been {what} for {self._deadline:g} seconds") from None
        if what not in report:
            self._reports.put(report)
            raise self._error(report)
        return report[what]

    def failure(self, until: float) -> tuple[int, FedSpanError]:
        """Error to tell if no other rank's number is lower: 0 its own, 1 death, 2 silence until then, 3 lost others.

        Args:
            until: by ``time.monotonic``.
        """
        while True:
            try:
                report = self._reports.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                return 2, WorkerDied(f"{self.name} has not answered for {self._deadline:g} seconds")
            if "died" in report:
                return 1, self._error(report)
            if "error" in report:
                return 3 if report["error"] == WorkerDied.__name__ else 0, self._error(report)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None  # noqa: S101 - opened above
        with contextlib.suppress(BrokenPipeError):  # a line that it has not read is still to be written
            self.process.stdin.close()

    def _error(self, report: dict[str, Any]) -> FedSpanError:
        if "error" in report:
            classes = {kind.__name__: kind for kind in AT_A_SITE}
            return classes.get(report["error"], TrainingError)(f"{self.name}: {report['text']}")
        code = report["died"]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerDied(f"{self.name} {how}; the site's log says more")


def _read(
    pipe: int, process: "subprocess.Popen[str]", reports: "SimpleQueue[dict[str, Any]]", ended: Callable[[], object]
) -> None:
    with os.fdopen(pipe) as told:
        for line in told:
            reports.put(json.loads(line))
    reports.put({"died": process.wait()})
    ended()


def _stop(others: list[_Other], folder: str) -> None:
    for other in others:
        other.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _described(tensors: Tensors) -> list[tuple[str, list[int], str]]:
    return [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
