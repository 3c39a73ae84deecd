"""The trackers themselves: MLflow on a database, W&B offline, and both when their servers are gone.

They need the extras `mlflow` and `wandb`: `make trackers-test` installs both. Without them these tests fail.
"""

import getpass
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config.federation import resolved
from deploy.sandbox.tiny import make_federation
from server.run.folder import RunFolder, read_run
from tests.harness import sample_run
from tests.harness.processes import FEDSPAN, environment
from tests.harness.results import events, lines
from tests.server.tracking.test_trackers import numbers

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # of packages that we do not choose
]
Values = dict[tuple[str, int], list[float]]  # by tag and round


def wanted(run: Path) -> Values:
    """The numbers in a run's own records."""
    found: Values = {}
    for record in lines(run / "metrics.jsonl"):
        for tag, value in numbers(record).items():
            found.setdefault((tag, record["round"]), []).append(value)
    return found


def in_mlflow(uri: str, experiment: str) -> tuple[Any, Values]:
    """The one run of an experiment, and its numbers."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    found: Values = {}
    for tag in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, tag):
            found.setdefault((tag, point.step), []).append(point.value)
    return run, found


def kept(file: bytes) -> Iterator[bytes]:
    """The records in a file of W&B: LevelDB's log after a header of 7 bytes, in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(file):
        if 2**15 - at % 2**15 < 7:  # no room for another head in this block
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", file, at)
        record += file[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def in_wandb(run: Path) -> tuple[list[Any], Values]:
    """All that W&B has written below a run's folder: its records of runs, and the numbers."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs: list[Any] = []
    found: Values = {}
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in kept(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            elif record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for tag, value in row.items():
                    if tag != "round" and not tag.startswith("_"):
                        found.setdefault((tag, row["round"]), []).append(value)
    return runs, found


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_numbers_reach_both_and_go_on_in_the_same_run(tmp_path: Path, uri: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("server.tracking.trackers._PATIENCE", 120.0)  # making the database takes seconds
    tracking = {"mlflow": {"uri": uri, "experiment": "ours"}, "wandb": {"project": "ours", "mode": "offline"}}
    run = tmp_path / "run"
    folder = sample_run.begin(run, tracking=tracking)
    sample_run.play_round(folder, 1)
    folder.interrupt()
    folder.close()
    assert in_mlflow(uri, "ours")[0].info.status == "KILLED"
    federation = resolved(sample_run.federation(tracking=tracking), tmp_path / "federation.yaml")
    folder = RunFolder.reopen(run, federation)
    for number in (2, 3):
        sample_run.play_round(folder, number)
    folder.finish()
    folder.close()
    assert events(run, "tracker_failed") == []
    made, found = in_mlflow(uri, "ours")
    assert found == wanted(run)
    assert (made.info.run_name, made.info.status) == ("run", "FINISHED")
    assert made.data.params["strategy.name"] == "fedftg"
    assert made.data.tags["fedspan.run"] == read_run(run)["id"]
    runs, found = in_wandb(run)
    assert found == wanted(run)
    assert len(runs) >= 2
    assert {(one.run_id, one.project, one.display_name) for one in runs} == {(read_run(run)["id"], "ours", "run")}
    told = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert told["strategy.name"] == "fedftg"
    assert {one.host for one in runs} == {"fedspan"}
    for file in (run / "wandb").rglob("*.*"):  # its own log of this machine may name paths
        if file.is_file() and file.suffix != ".log":
            assert file.name != "requirements.txt"
            for private in (sys.prefix, str(tmp_path), str(Path.home()), f'"{getpass.getuser()}"'):
                assert private.encode() not in file.read_bytes(), (file, private)


def test_run_of_processes_hands_on_the_environment(tmp_path: Path, uri: str) -> None:
    tracking = {"mlflow": {}, "wandb": {"mode": "offline"}}
    file = make_federation(tmp_path, {"site-a": 8, "site-b": 8}, tracking=tracking)
    env = {**environment(), "MLFLOW_TRACKING_URI": uri}
    command = [*FEDSPAN, "run", str(file), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "tiny"
    assert events(run, "tracker_failed") == []
    assert in_mlflow(uri, "tiny")[1] == wanted(run)
    assert in_wandb(run)[1] == wanted(run)


def test_servers_that_never_answer_end_nothing(tmp_path: Path, silent: str) -> None:
    """In a process of its own, whose end W&B's hook might delay."""
    code = (
        "import sys; from pathlib import Path; from tests.harness import sample_run\n"
        "sample_run.completed(Path(sys.argv[1]), tracking={'mlflow': {'uri': sys.argv[2]}, 'wandb': {}})"
    )
    env = {**environment(), "WANDB_BASE_URL": silent, "WANDB_API_KEY": "0" * 40}
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), silent], env=env, timeout=300, check=True)
    assert time.monotonic() - started < 150
    assert read_run(tmp_path / "run")["status"] == "completed"
    told = [event["reason"] for event in events(tmp_path / "run", "tracker_failed")]
    assert sorted(reason.split()[0] for reason in told) == ["MLflow", "W&B"]


def test_without_a_key_nobody_is_asked_for_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.harness import sample_run\n"
        "sample_run.completed(Path(sys.argv[1]), tracking={'wandb': {}})"
    )
    env = {key: value for key, value in environment().items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    leader, follower = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], env=env, stdin=follower)
    try:
        assert process.wait(120) == 0
    finally:
        process.kill()
        os.close(leader)
        os.close(follower)
    (failed,) = events(tmp_path / "run", "tracker_failed")
    assert failed["reason"].startswith("W&B gets no more numbers: ")
    assert read_run(tmp_path / "run")["status"] == "completed"
