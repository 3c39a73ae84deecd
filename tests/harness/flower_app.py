"""Runs a Flower app on real SuperLink and SuperNode processes, without FedSpan's launcher."""

import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from flwr.proto.control_pb2 import ListRunsRequest

from common.system.processes import ProcessGroup, free_ports, listens
from server.superlink.bundle import make_bundle
from server.superlink.control import control, start_run
from server.superlink.process import OwnSuperLink
from tests.harness.launcher import ROOT, environment

BIN = Path(sysconfig.get_path("scripts"))


class Flower:
    """A SuperLink, and SuperNodes that come and go. Use as a context manager."""

    def __init__(self, folder: Path, threads: int = 1, env: Mapping[str, str] | None = None) -> None:
        self._logs = folder / "logs"
        self._supervisor = ProcessGroup(self._logs)
        port, self.fleet = free_ports(2)
        self.superlink = OwnSuperLink(port, f"127.0.0.1:{self.fleet}")
        self.ports: dict[str, int] = {}  # of the SuperNodes' Runtime APIs, by name
        home = folder / "flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(self.superlink.connection())
        own = {"FLWR_HOME": str(home), "HF_HUB_OFFLINE": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        own["OMP_NUM_THREADS"] = str(threads)
        self._env = environment() | dict(env or {}) | own | {"PATH": f"{BIN}:{environment()['PATH']}"}

    def __enter__(self) -> Self:
        fleet = ["--fleet-api-address", self.superlink.fleet, "--disable-runtime-dependency-installation"]
        command = [str(BIN / "flower-superlink"), "--insecure", "--port", str(self.superlink.port), *fleet]
        self._supervisor.start("superlink", command, self._env)
        wait_for(lambda: listens(self.superlink.port) and listens(self.fleet), 60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._supervisor.stop()

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
        started = self._supervisor.start(name, [str(BIN / "flower-supernode"), *link, *own], self._env)
        return psutil.Process(started.process.pid)

    def start_warm_node(
        self, name: str, config: str, status: Path, idle: float = 900.0
    ) -> tuple[psutil.Process, psutil.Process]:
        """Start a SuperNode and, beside it, a long-lived worker."""
        node = self.start_node(name, config, isolation="process")
        return node, self.start_worker(name, "--status", str(status), "--idle", str(idle))

    def start_worker(self, name: str, *options: str) -> psutil.Process:
        """Start a long-lived worker beside a SuperNode."""
        command = [sys.executable, "-P", str(ROOT / "client" / "connect" / "worker.py"), *options]
        command += ["--runtime-api", f"127.0.0.1:{self.ports[name]}"]
        return psutil.Process(self._supervisor.start(f"{name}-worker", command, self._env).process.pid)

    def submit(self, app: Path, config: Mapping[str, str | int]) -> None:
        start_run(self.superlink, make_bundle(app), config)

    def wait(self, seconds: float = 180.0) -> None:
        """Wait for the latest run to end, and well."""
        with control(self.superlink) as client:

            def ended() -> bool:
                runs = client.ListRuns(ListRunsRequest()).run_dict.values()
                status = max(runs, key=lambda run: run.pending_at).status
                assert status.status != "finished" or status.sub_status == "completed", (
                    self._logs / "superlink.log"
                ).read_text()[-3000:]
                return bool(status.status == "finished")

            wait_for(ended, seconds)


def kill(process: psutil.Process) -> None:
    """SIGKILL to a process and all that it started, as when a machine loses power."""
    for one in [process, *process.children(recursive=True)]:
        one.kill()


def wait_for(condition: Callable[[], object], seconds: float, every: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds:g} seconds"
        time.sleep(every)
