"""Any Flower app on real SuperLink and SuperNode processes of this machine, for tests and benchmarks."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from flwr.proto.control_pb2 import ListRunsRequest

from client.connect import programs
from common.errors import LaunchError
from common.system import flower
from common.system.processes import ProcessGroup, free_ports, last_lines, listens
from server.superlink.bundle import make_bundle
from server.superlink.control import control, start_run

ROOT = Path(__file__).resolve().parents[2]
SUPERLINK = "local"  # name of the connection in Flower's configuration


class Flower:
    """A SuperLink, and SuperNodes that come and go. Use as a context manager, which sets this process's FLWR_HOME.

    All of it is Flower's own, on ports of the loopback interface that every account of this machine can use.

    Args:
        folder: folder for Flower's files and the logs.
        threads: number of threads of PyTorch in every process.
        env: further environment variables of the processes.
    """

    def __init__(self, folder: Path, threads: int = 1, env: Mapping[str, str] | None = None) -> None:
        self._logs, self._home = folder / "logs", folder / "flwr"
        self._group = ProcessGroup(self._logs)
        self._port, self.fleet = free_ports(2)
        self.ports: dict[str, int] = {}  # ports of the SuperNodes' Runtime APIs, by name
        self._home.mkdir(parents=True)
        link = f'address = "127.0.0.1:{self._port}"\ninsecure = true\n'
        (self._home / "config.toml").write_text(f"[superlink.{SUPERLINK}]\n{link}", encoding="utf-8")
        code = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for apps that measure ours
        own = {"PYTHONPATH": code, "OMP_NUM_THREADS": str(threads), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        self._env = flower.environment(self._home, hub=False) | own | dict(env or {})

    def __enter__(self) -> Self:
        fleet = ["--fleet-api-address", f"127.0.0.1:{self.fleet}", "--disable-runtime-dependency-installation"]
        # Flower's own way, with its database in memory: benchmarks take it as the peer.
        own = ["--insecure", "--host", "127.0.0.1", "--port", str(self._port)]
        self._group.start("superlink", [flower.program("flower-superlink"), *own, *fleet], self._env)
        wait_for(lambda: listens(self._port) and listens(self.fleet), 60)
        self._outside, os.environ["FLWR_HOME"] = os.environ.get("FLWR_HOME"), str(self._home)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._group.stop()
        del os.environ["FLWR_HOME"]
        if self._outside is not None:
            os.environ["FLWR_HOME"] = self._outside

    def start_node(
        self,
        name: str,
        config: str,
        *,
        port: int | None = None,
        isolation: str = "subprocess",
        superlink: int | None = None,
    ) -> psutil.Process:
        """Start a SuperNode; ``superlink`` is the port where it finds its SuperLink."""
        self.ports[name] = port if port is not None else free_ports(1)[0]
        link = ["--insecure", "--grpc-rere", "--superlink", f"127.0.0.1:{superlink or self.fleet}"]
        own = ["--port", str(self.ports[name]), "--node-config", config, "--isolation", isolation]
        started = self._group.start(name, [flower.program("flower-supernode"), *link, *own], self._env)
        return psutil.Process(started.process.pid)

    def start_warm_node(
        self, name: str, config: str, status: Path, idle: float = 900.0
    ) -> tuple[psutil.Process, psutil.Process]:
        """Start a SuperNode and, beside it, a long-lived worker."""
        node = self.start_node(name, config, isolation="process")
        return node, self.start_worker(name, "--status", str(status), "--idle", str(idle))

    def start_worker(self, name: str, *options: str) -> psutil.Process:
        """Start a long-lived worker beside a SuperNode."""
        command = programs.worker(f"127.0.0.1:{self.ports[name]}", *options)
        return psutil.Process(self._group.start(f"{name}-worker", command, self._env).process.pid)

    def submit(self, app: Path, config: Mapping[str, str | int]) -> None:
        """Start a run of the app in a folder."""
        start_run(SUPERLINK, make_bundle(app), config)

    def wait(self, seconds: float = 180.0) -> None:
        """Wait for the latest run to end.

        Raises:
            LaunchError: it failed, or did not end in time.
        """
        with control(SUPERLINK) as client:

            def ended() -> bool:
                runs = client.ListRuns(ListRunsRequest()).run_dict.values()
                status = max(runs, key=lambda run: run.pending_at).status
                if status.status == "finished" and status.sub_status != "completed":
                    raise LaunchError(f"the run failed; {last_lines(self._logs / 'superlink.log', 40)}")
                return bool(status.status == "finished")

            wait_for(ended, seconds)


def kill(process: psutil.Process) -> None:
    """SIGKILL to a process and all that it started, as when a machine loses power."""
    for one in [process, *process.children(recursive=True)]:
        one.kill()


def wait_for(condition: Callable[[], object], seconds: float, every: float = 0.2) -> None:
    """Raise a LaunchError unless a condition, looked at ``every`` so many seconds, comes about in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LaunchError(f"did not happen within {seconds:g} seconds")
        time.sleep(every)
