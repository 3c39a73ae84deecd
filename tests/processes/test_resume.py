"""A federation whose every process was killed goes on with --resume, and ends where it would have ended."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from deploy.sandbox.tiny import make_federation
from tests.harness.launcher import launch, start, survivors

SIZES = {"site-a": 9, "site-b": 17}
ROUNDS = 4
STRATEGY = {"name": "rolora", "blocks": "lower half", "rank": 2}  # whose phase follows from the round


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    file = folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill_all(launcher: psutil.Process) -> None:
    """SIGKILL to the launcher and everything below it, as when the machine loses power."""
    for process in [launcher, *launcher.children(recursive=True)]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


@pytest.mark.timeout(900)
@pytest.mark.long
def test_killed_federation_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    quiet = {"every": 1, "max_examples": 2, "samples": 0}
    file = make_federation(tmp_path, SIZES, strategy=STRATEGY, rounds=ROUNDS, evaluation=quiet)
    runs = tmp_path / "runs"
    done = launch(file, "--name", "straight")
    assert done.returncode == 0, done.stdout + done.stderr

    launcher = start(file)
    deadline = time.monotonic() + 240
    while not any(e["event"] == "round_started" and e["round"] == 3 for e in lines(runs / "tiny", "events.jsonl")):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_all(psutil.Process(launcher.pid))
    launcher.communicate(timeout=30)  # closes its pipe
    deadline = time.monotonic() + 30
    while survivors(file):  # Flower's own children end when they miss their parents
        assert time.monotonic() < deadline, survivors(file)
        time.sleep(0.2)

    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**config, "training": {**config["training"], "learning_rate": 0.5}}))
    refused = launch(file, "--resume")
    assert refused.returncode == 2
    assert (
        "the federation file has changed since the run began: `training.learning_rate` was 0.01, is 0.5"
        in refused.stderr
    )
    file.write_text(yaml.safe_dump(config))

    resumed = launch(file, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed after round 2" in resumed.stdout
    straight, after = (
        {p.name: load_file(p) for p in (runs / run / "model").glob("*.safetensors")} for run in ("straight", "tiny")
    )
    (base,) = (load_file(p) for p in (tmp_path / "model").glob("*.safetensors"))
    for part, tensors in straight.items():
        for key, tensor in tensors.items():
            moved = float((tensor - base.get(key, 0.0)).norm())
            assert float((tensor - after[part][key]).norm()) <= 1e-5 * moved
    for run in ("straight", "tiny"):
        records = lines(runs / run, "metrics.jsonl")
        trained = [(r["round"], r["client"]) for r in records if r["phase"] == "train"]
        assert sorted(trained) == [(n, site) for n in range(1, ROUNDS + 1) for site in SIZES]
        evaluated = [(r["round"], r["client"]) for r in records if r["phase"] == "evaluate"]
        assert sorted(evaluated) == sorted((n, who) for n in range(ROUNDS + 1) for who in (*SIZES, "server"))
    assert (runs / "tiny" / "report.html").exists()

    again = launch(file, "--resume")
    assert again.returncode == 2
    assert "the run has ended well, nothing is left to do" in again.stderr


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path) -> None:
    done = launch(make_federation(tmp_path, SIZES), "--resume")
    assert done.returncode == 2
    assert "holds no run that could go on; leave out --resume" in done.stderr
