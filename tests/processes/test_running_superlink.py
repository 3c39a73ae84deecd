"""``fedspan serve`` on a SuperLink that runs already, which it neither starts nor stops."""

from pathlib import Path

import pytest

from common.system.processes import ProcessGroup, listens
from deploy.sandbox.flower import Flower, wait_for
from deploy.sandbox.tiny import make_federation
from server.run.folder import in_use
from server.run.state import read_state
from tests.harness.command import fedspan
from tests.harness.processes import FEDSPAN, SECONDS, environment
from tests.harness.results import outcome

SIZES = {"site-a": 9, "site-b": 17}

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def serve(file: Path) -> list[str]:
    return [*FEDSPAN, "serve", str(file), "--runs", str(file.parent / "runs"), "--superlink", "local"]


def test_run_ends_well(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, rounds=1, local=None, evaluation={"every": 9, "samples": 0})
    with Flower(tmp_path) as flower, ProcessGroup(tmp_path / "logs") as group:
        for site in SIZES:
            flower.start_node(site, f'site="{tmp_path / site}.yaml"')
        env = {**environment(), "FLWR_HOME": str(tmp_path / "flwr")}
        server = group.start("server", serve(file), env).process
        assert server.wait(SECONDS) == 0, (tmp_path / "logs" / "server.log").read_text()
    assert outcome(tmp_path / "runs" / "tiny")["status"] == "completed"
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()


def test_stop_ends_the_run_and_not_the_superlink(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9}, local=None)
    run_dir = tmp_path / "runs" / "tiny"
    with Flower(tmp_path) as flower, ProcessGroup(tmp_path / "logs") as group:
        env = {**environment(), "FLWR_HOME": str(tmp_path / "flwr")}
        supervisor = group.start("supervisor", serve(file), env).process
        begun = run_dir / "supervisor.json"
        wait_for(lambda: begun.exists() and read_state(run_dir).state == "running", SECONDS)
        code, said = fedspan("stop", "tiny", "--runs", run_dir.parent, "--deadline", 300)
        assert code == 0, said
        assert supervisor.wait(60) == 130
        wait_for(lambda: not in_use(run_dir), SECONDS)  # no site ever came: the server ends because it is told to
        assert listens(flower.fleet)
    assert read_state(run_dir).state == "interrupted"
