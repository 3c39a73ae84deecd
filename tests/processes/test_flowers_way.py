"""Flower's own commands, as docs/operators.md has them, on a SuperLink and SuperNodes that Flower starts."""

import subprocess
from pathlib import Path

import pytest

from common.system import flower
from deploy.cli import main
from deploy.sandbox.flower import ROOT, SUPERLINK, Flower
from deploy.sandbox.tiny import make_federation
from server.run.folder import read_lines, read_run
from tests.harness.agreements import agree_all
from tests.harness.processes import environment


@pytest.mark.long
def test_flwr_run_trains_and_the_report_is_written_afterwards(tmp_path: Path) -> None:
    file = agree_all(make_federation(tmp_path, {"site-a": 9, "site-b": 13}, rounds=1))
    run_dir = tmp_path / "runs" / "tiny"
    with Flower(tmp_path / "flower") as processes:
        for site in ("site-a", "site-b"):
            processes.start_node(site, f"site='{tmp_path / site}.yaml'")
        config = f"federation='{file}' run-dir='{run_dir}'"
        command = [flower.program("flwr"), "run", str(ROOT), SUPERLINK, "--run-config", config]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        processes.wait(240)
    assert read_run(run_dir)["status"] == "completed"
    trained = [record["client"] for record in read_lines(run_dir / "metrics.jsonl") if record["phase"] == "train"]
    assert sorted(trained) == ["site-a", "site-b"]
    assert main(["report", "tiny", "--runs", str(tmp_path / "runs")]) == 0
    assert (run_dir / "report.html").stat().st_size > 10_000
