"""The worker's supervisor, without processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from client import app, received
from client.connect import verify, worker_process
from client.connect.worker_process import RuntimeApi
from client.connect.worker_supervisor import Options, WorkerSupervisor
from client.privacy import guard
from client.training import team
from common.protocol.messages import SIGNATURES
from deploy.cli import main


def test_supervisor_outlives_a_status_file_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "logs" / "worker.json"
    options = Options(RuntimeApi("127.0.0.1:1"), idle=1.0, poll=1.0, status=file)
    supervisor = WorkerSupervisor(options)
    for _ in range(2):  # it fails, comes back, and fails again
        for state in ("working", "idle", "working"):
            supervisor._show(state)
        file.parent.mkdir()
        supervisor._show("idle")
        assert json.loads(file.read_text())["state"] == "idle"
        shutil.rmtree(file.parent)
    warnings = [record.getMessage() for record in caplog.records if record.name == "worker"]
    assert len(warnings) == 2
    assert all(text.startswith("the status file cannot be written ([Errno 2]") for text in warnings)


def test_names_by_which_programs_know_each_other_are_the_same() -> None:
    """The worker's process imports no FedSpan, and server and client not each other: each has its own copy."""
    assert (worker_process.VETTED, worker_process.LONG_LIVED) == (app.VETTED, received.LONG_LIVED)
    assert (worker_process.BUNDLE, worker_process.DEVICE_BYTES) == (guard.BUNDLE, team.DEVICE_BYTES)
    assert verify.RECORD_KEY == SIGNATURES


def test_memory_of_a_sites_other_devices_is_in_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker_process.DEVICE_BYTES, "4096")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: [100, 20][device])
    assert worker_process._on_device() == 4216
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        alone = psutil.Process().memory_info().rss
        assert worker_process._resident() > alone
        other.communicate(b"")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: --runtime-api"),
        (["--runtime-api", "127.0.0.1:1", "--status", "/none/worker.json"], "--status: folder /none does not exist"),
        (["--runtime-api", "127.0.0.1:1", "--idle", "soon"], "argument --idle: 'soon'; allowed: 0 seconds and more"),
        (["--runtime-api", "127.0.0.1:1", "--idle", "-1"], "argument --idle: '-1'; allowed: 0 seconds and more"),
        (["--runtime-api", "127.0.0.1:1", "--site", "/none/site.yaml"], "/none/site.yaml: no such file"),
        (["--runtime-api", "127.0.0.1:1", "--poll", "0"], "argument --poll: '0'; allowed: 0.01 seconds and more"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "worker", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
