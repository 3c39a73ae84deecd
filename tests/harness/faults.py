"""A real federation under the launcher, and what can happen to its processes."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from safetensors.torch import load_file

from tests.harness.launcher import command, environment, survivors

Event = dict[str, Any]


def lines(file: Path) -> list[Event]:
    """The complete records of a .jsonl file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


class Federation:
    """A run of ``fedspan run`` in the background. Use as a context manager."""

    def __init__(self, file: Path, name: str = "tiny", *options: str) -> None:
        self.file, self.run = file, file.parent / "runs" / name
        self._log = file.parent / f"{name}.log"
        self._begun = len(lines(self.run / "events.jsonl"))
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                command(file, "--name", name, *options), env=environment(), stdout=out, stderr=subprocess.STDOUT
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

    def events(self) -> list[Event]:
        """What has happened since this start."""
        return lines(self.run / "events.jsonl")[self._begun :]

    def wait_for(self, what: Callable[[], object], seconds: float = 180.0) -> None:
        """Wait until something has happened in the living federation."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, f"did not happen within {seconds:g} seconds\n{self.log}"
            time.sleep(0.02)

    def wait_event(self, kind: str, **fields: object) -> None:
        wanted = {"event": kind, **fields}
        self.wait_for(lambda: any(wanted.items() <= event.items() for event in self.events()))

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code; no process may be left then."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 30
        while survivors(self.file):  # of processes that were killed, whose children end when they miss their parents
            assert time.monotonic() < deadline, survivors(self.file)
            time.sleep(0.2)
        return code

    def find(self, *parts: str) -> list[psutil.Process]:
        """Living processes of this federation whose command line holds all parts."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("FLWR_HOME", "")
                line = " ".join(process.cmdline())
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and home.startswith(str(self.file.parent)) and all(part in line for part in parts):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def server(self) -> list[psutil.Process]:
        """The ServerApp's process, once it writes to the run folder."""
        return self.find("flwr-serverapp")

    def superlink(self) -> list[psutil.Process]:
        return self.find("superlink/program.py")

    def supernode(self, site: str) -> list[psutil.Process]:
        return self.find("supernode.py", f"{site}.yaml")

    def keeper(self, site: str) -> list[psutil.Process]:
        return self.find("worker.py", f"{site}-worker.json")

    def bench(self, site: str) -> list[psutil.Process]:
        """What does the work of a site."""
        keepers = {keeper.pid for keeper in self.keeper(site)}
        return [bench for bench in self.find("worker_process.py") if bench.ppid() in keepers]

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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model in a folder: of a run, its result."""
    return {key: t for p in sorted((folder / "model").glob("*.safetensors")) for key, t in load_file(p).items()}


def same_result(one: Path, other: Path, base: Path, tolerance: float = 1e-5) -> None:
    """The changes that two runs made to the model in the folder ``base`` differ by rounding only."""
    start, a, b = weights(base), weights(one), weights(other)
    assert a.keys() == b.keys()
    assert a
    for key, tensor in a.items():
        moved = float((tensor - start.get(key, torch.zeros(()))).norm())
        assert float((tensor - b[key]).norm()) <= tolerance * max(moved, 1e-12), key


def trainings(run: Path) -> list[tuple[int, str]]:
    """Which updates made the result, by round and site."""
    return sorted((r["round"], r["client"]) for r in lines(run / "metrics.jsonl") if r["phase"] == "train")
