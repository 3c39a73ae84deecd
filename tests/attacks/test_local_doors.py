"""Another account of an operator's, or a site's, machine can call nothing there, take nobody's place, read nothing."""

import socket
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

from client.connect.programs import supernode
from client.connect.worker_process import RuntimeApi
from client.superlink.dial import dial_socket
from common.system import flower
from common.system.processes import ProcessGroup
from deploy.sandbox.flower import wait_for
from server.operate.supervise import make_folder
from server.superlink.bundle import make_bundle
from server.superlink.control import control, start_run
from server.superlink.process import DATABASE, OwnSuperLink, sockets
from tests.attacks.account import as_other_account, needs_root
from tests.harness.processes import ROOT, environment

TASKS = (TaskType.SERVER_APP, TaskType.CLIENT_APP)


@dataclass
class Machine:
    """Where a SuperLink and the link of a site run."""

    superlink: OwnSuperLink
    site: Path
    home: Path
    programs: list[psutil.Process]

    def everything(self) -> list[psutil.Process]:
        return [one for program in self.programs for one in (program, *program.children(recursive=True))]

    def submit(self) -> int:
        return start_run(self.superlink, make_bundle(ROOT), {"run-dir": "/elsewhere"})

    def acquire(self, at: Path) -> bool:
        """Ask for any work, as SuperExec and a site's worker do; whether there was some."""
        with RuntimeApi(f"unix:{at}").connect(patience=0.0) as client:
            return client.AcquireTask(AcquireTaskRequest(supported_task_types=TASKS)).HasField("task")

    def token(self) -> str:
        """Of a ServerApp's task, from its command line, which every account can read."""
        lines = [one.cmdline() for one in self.programs[0].children(recursive=True)]
        return next((line[line.index("--token") + 1] for line in lines if "--token" in line), "")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("flwr")
    env = {**flower.environment(home, hub=False), "PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    with sockets(home) as folder, ProcessGroup(home / "logs") as group:
        superlink, site = OwnSuperLink(folder / "superlink", f"unix:{folder / 'fleet'}"), folder / "site"
        started = [group.start("superlink", superlink.command(home), env)]
        wait_for(superlink.listens, 120)
        link = supernode(home / "site.yaml", superlink.fleet, site, "--insecure", "--isolation", "process")
        started.append(group.start("site", link, env))
        machine = Machine(superlink, site, home, [psutil.Process(one.process.pid) for one in started])
        wait_for(lambda: site.exists() and len(machine.everything()) == 3, 120)  # with SuperExec
        yield machine


def test_nothing_listens_on_a_port(machine: Machine) -> None:
    found = [c for one in machine.everything() for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert found == []


@needs_root
def test_no_other_account_submits_an_app(machine: Machine) -> None:
    said = as_other_account(machine.submit)
    assert said.startswith("common.errors.LaunchError")
    assert "Permission denied" in said
    with control(machine.superlink) as client:
        assert not client.ListRuns(ListRunsRequest()).run_dict


@needs_root
@pytest.mark.parametrize("whose", ["superlink", "site"])
def test_no_other_account_takes_work(machine: Machine, whose: str) -> None:
    at = machine.superlink.socket if whose == "superlink" else machine.site
    assert machine.acquire(at) is False  # its own account may ask
    assert as_other_account(lambda: machine.acquire(at)).startswith("httpx.ConnectError: [Errno 13] Permission denied")


@needs_root
def test_no_other_account_joins_as_a_site(machine: Machine) -> None:
    fleet = Path(machine.superlink.fleet.removeprefix("unix:"))
    dial_socket(fleet, 5.0).close()
    assert "nobody answers (Permission denied)" in as_other_account(lambda: dial_socket(fleet, 5.0))


@needs_root
def test_no_other_account_listens_in_place_of_a_program_that_died(machine: Machine) -> None:
    def squat() -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(machine.site.with_name("other")))

    assert as_other_account(squat).startswith("PermissionError")
    assert as_other_account(machine.site.unlink).startswith("PermissionError")


@needs_root
def test_it_is_the_folder_that_keeps_them_out(machine: Machine) -> None:
    folder = machine.superlink.socket.parent
    folder.chmod(0o755)
    try:
        assert as_other_account(lambda: machine.acquire(machine.site)) == "returned False"
        assert as_other_account(machine.submit).startswith("returned ")
    finally:
        folder.chmod(0o700)


@needs_root
def test_token_of_a_task_on_a_command_line_opens_nothing(machine: Machine) -> None:
    machine.submit()
    wait_for(machine.token, 120, every=0.01)
    seen = RuntimeTokenHttpInterceptor(machine.token())

    def pull() -> object:
        api = RuntimeApi(f"unix:{machine.superlink.socket}")
        return api.connect(seen, patience=0.0).PullTaskInput(PullTaskInputRequest())

    assert "Permission denied" in as_other_account(pull)


def test_what_is_written_is_for_its_owner_alone(machine: Machine, tmp_path: Path) -> None:
    found = [machine.superlink.socket.parent, *(f for f in machine.home.rglob("*") if "logs" not in f.parts)]
    assert machine.home / DATABASE in found
    assert {str(file): oct(file.lstat().st_mode) for file in found if stat.S_IMODE(file.lstat().st_mode) & 0o077} == {}


@needs_root
def test_run_folder_that_was_open_is_closed() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others anyhow
        run = Path(name, "run")
        run.mkdir()
        for folder in (run, run.parent):
            folder.chmod(0o755)
        assert as_other_account(lambda: list(run.iterdir())) == "returned []"
        make_folder(run)
        assert as_other_account(lambda: list(run.iterdir())).startswith("PermissionError")


def test_database_holds_nodes_alone(machine: Machine) -> None:
    """Neither apps nor messages nor what is told of errors."""
    machine.submit()
    with closing(sqlite3.connect(machine.home / DATABASE)) as base:
        tables = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        filled = {name for name in tables if base.execute(f"SELECT 1 FROM {name}").fetchone()}  # noqa: S608 - its own
    assert filled - {"sqlite_sequence"} == {"node", "alembic_version"}
