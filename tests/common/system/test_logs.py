"""Logs: one JSON object per line, or text; never the text of an exception unless it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import main
from tests.harness.processes import ROOT

ROW = "Jane Doe, born 1970"
SERVER = """
import logging
from common.system.logs import configure
configure("server")
configure("twice")
logging.getLogger("flwr").info("of Flower")
logging.getLogger("flwr").debug("too much")
known = {"run": "r", "site": "site-a", "round": 3, "event": "late_reply"}
logging.getLogger("fedspan").warning("%s is late", "site-a", extra=known)
try:
    try:
        int("Jane Doe, born 1970")
    except ValueError as error:
        raise RuntimeError("Jane Doe, born 1970") from error
except RuntimeError:
    logging.getLogger("fedspan").exception("failed")
raise KeyError("Jane Doe, born 1970")
"""
SITE = """
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from client import app as site
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
def load(path, kind):
    raise ValueError("Jane Doe, born 1970")
site.load = load
message = Message(RecordDict({"config": ConfigRecord({"federation": '%s', "server-round": 2})}), 1, "train")
message.metadata.__dict__["_message_id"] = "1"
context = Context(7, 1, {"site": __file__ if "__file__" in globals() else "README.md"}, RecordDict(), {})
reply = site.app(message, context)
assert "Jane" not in reply.error.reason, reply.error.reason
assert reply.error.reason.startswith("ValueError at"), reply.error.reason
""".replace(
    "%s",
    json.dumps(
        {
            "name": "x",
            "model": {"path": "m"},
            "strategy": "fedftg",
            "rounds": 1,
            "training": {"learning_rate": 1.0, "local_steps": 1},
        }
    ),
)


def logged(program: str, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FEDSPAN_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    return done.stderr


def test_lines_are_json_and_say_who_where_and_what() -> None:
    text = logged(SERVER, FEDSPAN_LOG="json")
    flower, late, failed, end = lines = [json.loads(line) for line in text.splitlines()]
    assert {line["component"] for line in lines} == {"server"}
    assert flower["message"] == "of Flower"
    told = {key: value for key, value in late.items() if key not in ("time", "component")}
    assert told.pop("message") == "site-a is late"
    assert told == {"level": "warning", "run": "r", "site": "site-a", "round": 3, "event": "late_reply"}
    assert late["time"].endswith("+00:00")
    assert "RuntimeError\nraised after\n" in failed["traceback"]
    assert 'File "<string>", line 12' in failed["traceback"]
    assert "KeyError" in end["traceback"]
    assert end["level"] == "critical"
    assert ROW not in text


@pytest.mark.parametrize("format_", ["json", "text"])
def test_text_of_an_exception_is_shown_only_on_request(format_: str) -> None:
    assert ROW not in logged(SERVER, FEDSPAN_LOG=format_)
    assert logged(SERVER, FEDSPAN_LOG=format_, FEDSPAN_TRACEBACK="1").count(ROW) >= 3
    assert ROW not in logged(SERVER, FEDSPAN_LOG=format_, FEDSPAN_TRACEBACK="0")


def test_site_logs_an_unexpected_error_without_its_text() -> None:
    text = logged(SITE, FEDSPAN_LOG="json")
    (line,) = (json.loads(line) for line in text.splitlines())
    assert {key: line[key] for key in ("component", "run", "event", "level")} == {
        "component": "site", "run": "7", "event": "train", "level": "error",
    }  # fmt: skip
    assert "ValueError" in line["traceback"]
    assert ROW not in text
    assert ROW in logged(SITE, FEDSPAN_LOG="json", FEDSPAN_TRACEBACK="1")


@pytest.mark.parametrize("program", [["worker.py", "--runtime-api", "127.0.0.1:1"], ["supernode.py"]])
def test_unknown_format_is_refused_at_a_sites_start(program: list[str]) -> None:
    command = [sys.executable, str(ROOT / "client" / "connect" / program[0]), *program[1:]]
    env = {**os.environ, "FEDSPAN_LOG": "xml"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 2
    assert "error: FEDSPAN_LOG is 'xml'; allowed: json, text" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["serve", "x.yaml", "--insecure"], ["run", "x.yaml"]])
def test_unknown_format_is_refused_at_a_runs_start(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSPAN_LOG", "xml")
    assert main(command) == 2
    assert capsys.readouterr().err == "error: FEDSPAN_LOG is 'xml'; allowed: json, text\n"


ASIDE = """
import logging, os, pathlib, sys, warnings
from common.system import logs
logs.configure("site")
logging.getLogger("site").info("before")
logs.set_aside(pathlib.Path(sys.argv[1]))
logging.getLogger("site").info("round 1")
logging.getLogger("client.session").warning("ours")
logging.getLogger("flwr").warning("theirs, logged")
print("theirs, printed", flush=True)
os.write(2, b"theirs, native\\n")
warnings.warn("theirs, warned")
print("the end", file=logs.own())
raise KeyError("Jane Doe, born 1970")
"""


def test_lines_of_libraries_are_set_aside_and_ours_are_not(tmp_path: Path) -> None:
    file = tmp_path / "flower.log"
    command = [sys.executable, "-P", "-c", ASIDE, str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert [line.partition(" site: ")[2] for line in said if " site: " in line] == ["before", "round 1"]
    assert "the end" in said
    assert "the process ends on an error" in done.stderr  # a crash is ours to tell
    aside = file.read_text()
    assert [kind for kind in ("logged", "printed", "native", "warned") if f"theirs, {kind}" not in aside] == []
    assert "theirs" not in done.stderr
    assert "round 1" not in aside
    assert "Jane" not in done.stderr + aside
    assert file.stat().st_mode & 0o077 == 0
