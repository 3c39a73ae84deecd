"""A real federation of processes, started as its user starts it, and what can happen to its processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.harness.results import Record, lines

ROOT = Path(__file__).parents[2]
FEDSPAN = [sys.executable, "-m", "deploy"]
SECONDS = 400.0  # a deadline decides nothing: it ends what hangs


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def launch(federation: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a federation to its end."""
    command = [*FEDSPAN, "run", str(federation), "--runs", str(federation.parent / "runs"), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False)


def survivors(federation: Path) -> list[str]:
    """Command lines of living processes that belong to a run of ``federation``."""
    return [line for _, line in _living(federation.parent)]


class Federation:
    """A federation in the background. Use as a context manager.

    Args:
        file: the federation file.
        name: of the run.
        options: of ``fedspan run``.
        env: variables besides.
    """

    def __init__(self, file: Path, name: str = "tiny", *options: str, env: Mapping[str, str] | None = None) -> None:
        self.file, self.run = file, file.parent / "runs" / name
        self._log = file.parent / f"{name}.log"
        self._begun = len(lines(self.run / "events.jsonl"))
        command = [*FEDSPAN, "run", str(file), "--runs", str(self.run.parent), "--name", name, *options]
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env={**environment(), **(env or {})}, stdout=out, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    @property
    def log(self) -> str:
        """What the operator sees."""
        return self._log.read_text()

    def events(self) -> list[Record]:
        """What has happened since this start."""
        return lines(self.run / "events.jsonl")[self._begun :]

    def wait_for(self, what: Callable[[], object]) -> None:
        """Wait until something has happened in the living federation."""
        deadline = time.monotonic() + SECONDS
        while not what():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, f"did not happen within {SECONDS:g} seconds\n{self.log}"
            time.sleep(0.02)

    def wait_event(self, kind: str, **fields: object) -> None:
        wanted = {"event": kind, **fields}
        self.wait_for(lambda: any(wanted.items() <= event.items() for event in self.events()))

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code; no process may be left then."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 60
        while survivors(self.file):  # of processes that were killed, whose children end when they miss their parents
            assert time.monotonic() < deadline, survivors(self.file)
            time.sleep(0.2)
        return code

    def find(self, *parts: str) -> list[psutil.Process]:
        """Living processes of this federation whose command line holds all parts."""
        return [process for process, line in _living(self.file.parent) if all(part in line for part in parts)]

    def server(self) -> list[psutil.Process]:
        """The ServerApp's process, once it writes to the run folder."""
        return self.find("flwr-serverapp")

    def superlink(self) -> list[psutil.Process]:
        return self.find("superlink/program.py")

    def supernode(self, site: str) -> list[psutil.Process]:
        return self.find("supernode.py", f"{site}.yaml")

    def worker_supervisor(self, site: str) -> list[psutil.Process]:
        return self.find("worker.py", f"{site}-worker.json")

    def worker_process(self, site: str) -> list[psutil.Process]:
        """What does the work of a site."""
        supervisors = {one.pid for one in self.worker_supervisor(site)}
        return [one for one in self.find("worker_process.py") if one.ppid() in supervisors]

    def works(self, site: str) -> bool:
        """Whether a site's worker is at work on a message."""
        status = self.run / "logs" / f"{site}-worker.json"
        return status.exists() and json.loads(status.read_text())["state"] == "working"


def kill(processes: list[psutil.Process]) -> int:
    """SIGKILL; how many there were."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return len(processes)


def _living(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Processes whose Flower files are below a folder, with their command lines."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            home = process.environ().get("FLWR_HOME", "")
            if home.startswith(f"{folder}{os.sep}") and process.status() != psutil.STATUS_ZOMBIE:
                yield process, " ".join(process.cmdline())
