"""What goes wrong in a real federation ends it with the reason of who failed, and leaves no process behind."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from deploy.sandbox.tiny import make_federation, make_model
from tests.harness.launcher import launch, start, survivors


def outcome(federation: Path) -> dict[str, object]:
    return dict(json.loads((federation.parent / "runs" / "tiny" / "run.json").read_text()))


def edit_site(federation: Path, site: str, **changes: object) -> None:
    file = federation.parent / f"{site}.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


@pytest.mark.long
def test_site_with_another_base_model_is_refused_by_name_with_both_digests(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 9})
    make_model(tmp_path / "other", seed=1)
    edit_site(file, "site-b", model="other")
    done = launch(file)
    assert done.returncode == 1
    reason = str(outcome(file)["reason"])
    ours = str(outcome(file)["base_digest"])
    assert "site-b: its base model differs: digest " in reason
    assert ours in reason
    assert reason in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert survivors(file) == []


@pytest.mark.long
def test_reason_of_a_site_that_raises_in_training_reaches_the_operator(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 9}, training={"learning_rate": 1.0e30})
    done = launch(file)
    assert done.returncode == 1
    assert "site-a: loss is nan in round 1, step" in done.stderr
    assert "0 valid updates" in done.stderr or "no update" in done.stderr
    assert outcome(file)["status"] == "failed"
    assert survivors(file) == []


@pytest.mark.long
def test_site_that_cannot_start_tells_why(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 9}, cohort={"min_clients": 1}, rounds=1)
    edit_site(file, "site-b", device="cuda:7")
    done = launch(file)
    assert done.returncode == 0, done.stderr  # one site is enough here; the other's reason is told all the same
    assert "device cuda:7 is asked for" in done.stdout
    assert survivors(file) == []


def wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.2)


def test_interrupt_in_the_middle_stops_everything(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 9})
    launcher = start(file)
    try:
        wait_for(lambda: any("worker_process.py" in line for line in survivors(file)), 90)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=30) == 130
    finally:
        launcher.kill()
        launcher.communicate()
    assert survivors(file) == []


def test_killed_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9})
    launcher = start(file)
    try:
        wait_for(lambda: any("worker_process.py" in line for line in survivors(file)), 90)
    finally:
        launcher.kill()
        launcher.communicate()
    wait_for(lambda: not survivors(file), 30)


@pytest.mark.long
def test_supernode_killed_too_often_ends_the_run_with_its_name(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 9})
    launcher = start(file, "--tries", "0")
    try:
        wait_for(lambda: any("site-b.yaml" in line for line in survivors(file)), 90)
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if "supernode.py" in line and str(tmp_path / "site-b.yaml") in line:
                process.kill()
        output, _ = launcher.communicate(timeout=90)
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert "site-b ended 1 times by itself" in output
    assert survivors(file) == []
