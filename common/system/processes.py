"""Groups of processes that are started and stopped together; no process outlives its group."""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from common.errors import LaunchError
from common.text import SENTENCE, one_line

MARK = "FEDSPAN_RUN"  # environment variable that every process of a run carries, however deep
_PART = "FEDSPAN_PART"  # likewise: the process of the group that it descends from
_PR_SET_PDEATHSIG = 1
_LONGEST_FOLDER = 80  # bytes; the path of a socket has 103 on macOS, 107 on Linux


@dataclass
class Started:
    """A process of a group."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None
    command: Sequence[str]
    env: Mapping[str, str]


class ProcessGroup:
    """Starts processes with a log file each, and stops all of them with all their children.

    Use as a context manager: leaving it, in whatever way, stops everything. If this process is killed, the kernel ends
    its direct children (Linux), and Flower's own children end with their parents.

    Args:
        logs: folder of the log files; None: the processes write to this process's standard output and error.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, logs: Path | None, grace: float = 5.0) -> None:
        self.started: list[Started] = []
        self._logs, self._grace = logs, grace
        self._mark = uuid.uuid4().hex

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Started:
        """Start a process; its output goes to ``<logs>/<name>.log``.

        Raises:
            LaunchError: the program cannot be executed.
        """
        log = self._logs / f"{name}.log" if self._logs is not None else None
        with contextlib.ExitStack() as files:
            out = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                out = files.enter_context(log.open("ab"))
                out.write(f"$ {shlex.join(command)}\n".encode())
                out.flush()
            try:
                process = subprocess.Popen(  # noqa: S603 - the command is ours
                    command,
                    env={**env, MARK: self._mark, _PART: name},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT if out is not None else None,
                    start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops the others in order
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise LaunchError(f"{name}: {command[0]} cannot be started ({error.strerror})") from None
        started = Started(name, process, log, command, env)
        self.started.append(started)
        return started

    def forget(self, started: Started) -> None:
        """Remove a process that has ended from the group, and kill the children that it left."""
        started.process.wait()
        self.started.remove(started)
        while left := marked(self._mark, started.name):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop every process of the run: SIGTERM first, SIGKILL after the grace period. Returns when none is left."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        while self._living() and time.monotonic() < deadline:
            time.sleep(0.05)
        while self._living():
            self._signal(signal.SIGKILL)
            time.sleep(0.05)
        for started in self.started:
            started.process.wait()  # reap
        self.started.clear()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._living():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _living(self) -> list[psutil.Process]:
        """Every process that carries this run's mark, children of children and re-parented ones included."""
        for started in self.started:
            started.process.poll()
        return marked(self._mark)


def marked(mark: str, part: str | None = None) -> list[psutil.Process]:
    """Living processes whose environment has ``FEDSPAN_RUN=mark``; with ``part``, only its descendants."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
            if env.get(MARK) == mark and part in (None, env.get(_PART)):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.pid != os.getpid()]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def listens(where: int | Path) -> bool:
    """Whether a connection to a port of the loopback interface, or to a Unix socket, is accepted."""
    with socket.socket(socket.AF_INET if isinstance(where, int) else socket.AF_UNIX) as s:
        s.settimeout(1.0)
        return s.connect_ex(("127.0.0.1", where) if isinstance(where, int) else str(where)) == 0


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A new folder for Unix sockets that no other account may enter; removed at the end.

    Raises:
        LaunchError: the folder's path is too long for the path of a socket.
    """
    with tempfile.TemporaryDirectory(prefix="fedspan-", ignore_cleanup_errors=True) as name:  # its mode is 0700
        if len(os.fsencode(name)) > _LONGEST_FOLDER:
            raise LaunchError(f"{name}: too long for a folder of sockets ({_LONGEST_FOLDER} bytes); set TMPDIR shorter")
        yield Path(name)


def last_lines(log: Path | None, count: int = 5) -> str:
    """The end of a log file, on one line; others wrote some of it."""
    if log is None or not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return " | ".join(one_line(line, SENTENCE) for line in [line for line in lines if line][-count:])


def die_with_parent() -> None:
    """In a child: ask the kernel to end it when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
