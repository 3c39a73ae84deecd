"""The long-lived worker: one process for many messages, and what happens when it, or the SuperNode, goes away."""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from flwr.cli.build import build_fab_from_disk

from deploy.cli import main
from deploy.keys import bundle
from deploy.sandbox.flower import Flower, kill, wait_for
from tests.harness.processes import SECONDS

pytestmark = pytest.mark.timeout(1200)
APP = Path(__file__).parent / "orders_app"


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
    flower.submit(app, {"orders": orders, "out": str(out)})


def test_one_process_answers_many_messages_and_its_death_is_an_answer_too(flower: Flower, tmp_path: Path) -> None:
    flower.start_warm_node("site", "x=1", tmp_path / "worker.json", idle=10.0)
    out, go = tmp_path / "answers.json", tmp_path / "go"
    submit(flower, out, f"answer,answer,fail,answer,die,answer,until {go},answer")
    wait_for(lambda: len(answers(out)) == 6 and status(tmp_path)["bench"] is None, SECONDS)
    go.touch()
    flower.wait(SECONDS)
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
    wait_for(lambda: status(tmp_path)["bench"] is None, SECONDS)
    assert not psutil.pid_exists(last["pid"])


@pytest.mark.long
def test_worker_outlives_the_supernode_and_changes_the_process_with_the_bundle(flower: Flower, tmp_path: Path) -> None:
    node, worker = flower.start_warm_node("site", "x=1", tmp_path / "worker.json")
    out = tmp_path / "answers.json"
    submit(flower, out, "answer,answer")
    flower.wait(SECONDS)
    kill(node)
    wait_for(lambda: status(tmp_path)["state"] == "no SuperNode", SECONDS)
    flower.start_node("again", "x=1", port=flower.ports["site"], isolation="process")
    wait_for(lambda: status(tmp_path)["state"] == "idle", SECONDS)
    submit(flower, tmp_path / "second.json", "answer")
    flower.wait(SECONDS)
    before, again = answers(out), answers(tmp_path / "second.json")
    assert again[0]["pid"] == before[0]["pid"]
    assert again[0]["answered"] == 3

    changed = tmp_path / "changed"
    shutil.copytree(APP, changed)
    client = changed / "orders_client.py"
    client.write_text(client.read_text() + "\nanswered = 100\n")
    submit(flower, tmp_path / "third.json", "answer", changed)
    flower.wait(SECONDS)
    (third,) = answers(tmp_path / "third.json")
    assert third["pid"] != before[0]["pid"]
    assert third["answered"] == 101  # the new bundle's code
    assert not psutil.pid_exists(before[0]["pid"])

    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    assert not psutil.pid_exists(third["pid"])


def test_worker_runs_only_what_its_site_trusts_and_takes_its_process_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))  # where benches unpack what they run
    for name in ("reviewer", "stranger"):
        main(["code", "key", str(tmp_path / name)])
        data = {"path": "rows.jsonl", "prompt": "p", "answer": "a"}
        site = {"name": "site-a", "data": data, "trust": {"keys": [f"{name}.pub"]}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(site))
    digest = hashlib.sha256(build_fab_from_disk(APP)).hexdigest()
    signatures = tmp_path / "signatures.json"
    signatures.write_text(json.dumps([bundle.sign(tmp_path / "reviewer.key", digest)]))
    out, go = tmp_path / "answers.json", tmp_path / "go"
    with Flower(tmp_path) as flower:
        flower.start_node("site", "x=1", isolation="process")
        doubting = flower.start_worker("site", "--site", str(tmp_path / "stranger.yaml"))
        orders = f"answer,until {go},answer"
        flower.submit(APP, {"orders": orders, "out": str(out), "signatures": str(signatures)})
        wait_for(lambda: answers(out), SECONDS)
        assert [list(folder.iterdir()) for folder in scratch.glob("fedspan-bundle-*")] == [[]]
        doubting.terminate()
        doubting.wait(60)
        worker = flower.start_worker("site", "--site", str(tmp_path / "reviewer.yaml"))
        go.touch()
        flower.wait(SECONDS)
        refused, answered = answers(out)
        assert psutil.pid_exists(answered["pid"])
        worker.kill()
        wait_for(lambda: not psutil.pid_exists(answered["pid"]), SECONDS)
    reason = f"site-a: the app bundle {digest} is not signed by a key in its trust list and not pinned"
    assert refused["error"] == f"{reason}; nothing of it was run"
    assert (answered["bundle"], answered["vetted"], answered["installed"]) == (digest, "1", [])
    log = (tmp_path / "logs" / "site-worker.log").read_text()
    assert log.count(reason) == 1
