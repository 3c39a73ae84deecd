"""Use of a running server's processes: CPU, memory, threads, open descriptors; and the size of its database."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

SAMPLE_SECONDS = 0.25
#: Patterns of command lines by process of the server.
PARTS = {"SuperLink": "superlink/program.py", "ServerApp": "flwr-serverapp"}


@dataclass
class Used:
    """Resources that one process has used so far: CPU seconds, and its peak memory in bytes."""

    cpu: float = 0.0
    peak: int = 0


@dataclass(frozen=True)
class Sample:
    """A process at one moment.

    Attributes:
        time: seconds since the epoch.
        part: the process, a key of ``PARTS``, or "supervisor".
        memory: resident bytes.
        descriptors: open ones.
        threads: number of threads.
    """

    time: float
    part: str
    memory: int
    descriptors: int
    threads: int


class Watch:
    """Looks at a server's processes until its end. Use as a context manager.

    Args:
        server: process id of the supervisor.
        base: folder of the SuperLink's database.

    Attributes:
        used: resources by process of ``PARTS``.
        samples: every look at every process.
        database: (seconds since the epoch, bytes) of the database's files.
    """

    def __init__(self, server: int, base: Path) -> None:
        self._server, self._base = psutil.Process(server), base
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.used: Mapping[str, Used] = {name: Used() for name in PARTS}
        self.samples: list[Sample] = []
        self.database: list[tuple[float, int]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                processes = [self._server, *self._server.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.database.append((time.time(), database_bytes(self._base)))
            for process in processes:
                try:
                    self._note(process)
                except (psutil.NoSuchProcess, OSError):
                    continue

    def _note(self, process: psutil.Process) -> None:
        line, times = " ".join(process.cmdline()), process.cpu_times()
        part = next((name for name, pattern in PARTS.items() if pattern in line), None)
        if part is None and process != self._server:
            return
        now = Sample(
            time.time(), part or "supervisor", process.memory_info().rss, process.num_fds(), process.num_threads()
        )
        self.samples.append(now)
        if part is not None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peak = next((int(one.split()[1]) for one in status.splitlines() if one.startswith("VmHWM")), 0)
            self.used[part].cpu = max(self.used[part].cpu, times.user + times.system)
            self.used[part].peak = max(self.used[part].peak, 1024 * peak)


def database_bytes(folder: Path) -> int:
    """Bytes of the SuperLink's database with its journals."""
    sizes = []
    for one in folder.glob("superlink.sqlite*"):
        try:
            sizes.append(one.stat().st_size)
        except FileNotFoundError:  # a journal that was merged just now
            continue
    return sum(sizes)
