"""The operator's commands on a real federation: look at it, scrape it, list it with Flower's own, stop it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.system.processes import ProcessGroup, free_ports, listens
from deploy.sandbox.flower import Flower, wait_for
from deploy.sandbox.tiny import make_federation
from server.run.folder import check_resumable, in_use
from server.run.state import read_state
from tests.harness.launcher import FEDSPAN, command, environment, survivors
from tests.processes.test_supervise import supervise
from tests.server.operate.test_metrics import scrape


def told(file: Path, verb: str, *arguments: str) -> str:
    program = [*FEDSPAN, verb, "--runs", str(file.parent / "runs"), *arguments]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flower_lists(file: Path, run_id: str) -> dict[str, Any]:
    """A run as Flower's own command shows it."""
    said = told(file, "flower", "tiny", "list", "local", "--run-id", run_id, "--format", "json")
    (run,) = json.loads(said[said.index("{") :])["runs"]
    return dict(run)


@pytest.mark.timeout(500)
def test_run_is_seen_scraped_and_stopped_from_outside(tmp_path: Path) -> None:
    settings = {"evaluation": {"every": 999, "max_examples": 1, "samples": 0}, "rounds": 900}
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 17}, **settings)
    (port,) = free_ports(1)
    run_dir, log = tmp_path / "runs" / "tiny", tmp_path / "launcher.log"
    with log.open("w") as out:
        launcher = subprocess.Popen(
            command(file, "--metrics-port", str(port)),
            env={**environment(), "FEDSPAN_LOG": "json"},
            stdout=out,
            stderr=out,
        )
    try:
        wait_for(lambda: (run_dir / "supervisor.json").exists(), 60)
        wait_for(lambda: read_state(run_dir).finished_rounds, 240)
        seen = json.loads(told(file, "status", "tiny", "--json"))
        assert seen["state"] == "running"
        assert {s["site"]: (s["connection"], s["device"], s["rounds"] > 0) for s in seen["sites"]} == {
            "site-a": ("up", "cpu", True),
            "site-b": ("up", "cpu", True),
        }
        samples = {name: value for (name, _), value in scrape(port).items()}
        assert samples["fedspan_rounds"] == 900
        assert samples["fedspan_round"] >= seen["round"]
        assert samples["fedspan_sites_connected"] == 2
        federation = resolved(load(file, FederationConfig), file)
        assert flower_lists(file, seen["flower_run"])["status"] == "running"

        assert "tiny is stopped after round" in told(file, "stop", "tiny")
        assert launcher.wait(60) == 130, log.read_text()
    finally:
        launcher.kill()
        launcher.wait()
    assert survivors(file) == []
    check_resumable(run_dir, federation)
    ended = read_state(run_dir)
    assert ended.state == "interrupted"
    assert str(ended.to_go_on).endswith("--resume")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["component"], line["run"]) for line in lines} == {("supervisor", "tiny")}
    assert {"client_joined", "round_finished"} <= {line.get("event") for line in lines}
    worker = [line for line in (run_dir / "logs" / "site-a-worker.log").read_text().splitlines() if line[:1] != "$"]
    assert {"site-a"} == {site for line in worker if (site := json.loads(line).get("site"))}


@pytest.mark.long
@pytest.mark.timeout(500)
def test_stop_ends_the_run_on_a_superlink_that_goes_on(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9}, local=None)
    run_dir = tmp_path / "runs" / "tiny"
    with Flower(tmp_path) as flower, ProcessGroup(tmp_path / "logs") as group:
        env = {**environment(), "FLWR_HOME": str(tmp_path / "flwr")}
        supervisor = group.start("supervisor", supervise(file, "--superlink", "local"), env).process
        wait_for(
            lambda: read_state(run_dir).state == "running" if (run_dir / "supervisor.json").exists() else None, 120
        )
        told(file, "stop", "tiny")
        assert supervisor.wait(60) == 130
        wait_for(lambda: not in_use(run_dir), 60)  # no site ever came: the server ends because it is told to
        assert listens(flower.fleet)
    assert read_state(run_dir).state == "interrupted"
