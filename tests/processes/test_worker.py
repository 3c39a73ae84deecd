"""The long-lived worker: one process for many messages, and what happens when it, or the SuperNode, goes away."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes.flower_app import Flower, kill, wait_for

APP = Path(__file__).parent / "orders_app"
WORKER = Path(__file__).parents[2] / "client" / "worker.py"


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    with Flower(tmp_path) as running:
        yield running


def status(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "worker.json"
    return json.loads(file.read_text()) if file.exists() else {}


def answers(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())) if file.exists() else []


def submit(flower: Flower, out: Path, orders: str, app: Path = APP) -> None:
    flower.submit(app, f'orders="{orders}" out="{out}"')


def test_one_process_answers_many_messages_and_its_death_is_an_answer_too(flower: Flower, tmp_path: Path) -> None:
    flower.start_warm_node("site", "x=1", tmp_path / "worker.json", idle=4.0)
    out = tmp_path / "answers.json"
    submit(flower, out, "answer,answer,fail,answer,die,answer,pause 9,answer")
    flower.wait(240)
    first, second, failed, third, died, after, last = answers(out)
    assert first["worker"] == "1"
    assert first["pid"] == second["pid"] == third["pid"]
    assert [a["answered"] for a in (first, second, third)] == [1, 2, 4]
    assert failed["error"] == "ValueError in the site's worker; the site's log says more"  # nothing of the row
    assert died["error"] == "the site's worker process ended with exit code 3; its log says more"
    assert after["pid"] != first["pid"]
    assert after["answered"] == 1
    assert last["pid"] != after["pid"]  # it was idle for longer than it may be
    # What the app keeps in Flower's context lives on, except for the message at which the process died.
    assert [a["seen"] for a in (first, second, third, after, last)] == [1, 2, 4, 5, 6]
    shown = status(tmp_path)
    assert (shown["messages"], shown["crashes"]) == (7, 1)
    assert shown["memory_bytes"] > 10**6
    wait_for(lambda: status(tmp_path)["bench"] is None, 20)
    assert not psutil.pid_exists(last["pid"])


def test_worker_outlives_the_supernode_and_changes_the_process_with_the_bundle(flower: Flower, tmp_path: Path) -> None:
    node, worker = flower.start_warm_node("site", "x=1", tmp_path / "worker.json")
    out = tmp_path / "answers.json"
    submit(flower, out, "answer,answer")
    flower.wait(150)
    kill(node)
    wait_for(lambda: status(tmp_path)["state"] == "no SuperNode", 30)
    flower.start_node("again", "x=1", port=flower.ports["site"], isolation="process")
    wait_for(lambda: status(tmp_path)["state"] == "idle", 60)
    submit(flower, tmp_path / "second.json", "answer")
    flower.wait(150)
    before, again = answers(out), answers(tmp_path / "second.json")
    assert again[0]["pid"] == before[0]["pid"]
    assert again[0]["answered"] == 3

    changed = tmp_path / "changed"
    shutil.copytree(APP, changed)
    client = changed / "orders_client.py"
    client.write_text(client.read_text() + "\nanswered = 100\n")
    submit(flower, tmp_path / "third.json", "answer", changed)
    flower.wait(150)
    (third,) = answers(tmp_path / "third.json")
    assert third["pid"] != before[0]["pid"]
    assert third["answered"] == 101  # the new bundle's code
    assert not psutil.pid_exists(before[0]["pid"])

    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    assert not psutil.pid_exists(third["pid"])


def test_keeper_that_is_killed_takes_its_process_along(flower: Flower, tmp_path: Path) -> None:
    _, worker = flower.start_warm_node("site", "x=1", tmp_path / "worker.json")
    out = tmp_path / "answers.json"
    submit(flower, out, "answer")
    flower.wait(150)
    worker.kill()
    wait_for(lambda: not psutil.pid_exists(answers(out)[0]["pid"]), 20)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: --runtime-api"),
        (["--runtime-api", "127.0.0.1:1", "--root-certificates", "/none/ca.crt"], "/none/ca.crt does not exist"),
        (["--runtime-api", "127.0.0.1:1", "--status", "/none/worker.json"], "--status: folder /none does not exist"),
        (["--runtime-api", "127.0.0.1:1", "--idle", "soon"], "argument --idle: invalid float value: 'soon'"),
        (["--runtime-api", "127.0.0.1:1", "--idle", "-1"], "--idle is -1; allowed: 0 seconds and more"),
        (["--runtime-api", "127.0.0.1:1", "--poll", "0"], "--poll is 0; allowed: 0.01 seconds and more"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
