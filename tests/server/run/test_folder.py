"""A run's folder: written whole or not at all, read while it grows, never written over."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.errors import RunFolderError
from server.run.folder import RunFolder, in_use, read_lines
from tests.harness.sample_run import completed, federation


def test_settings_come_back_with_defaults_and_absolute_paths(tmp_path: Path) -> None:
    source = tmp_path / "federation.yaml"
    RunFolder.create(tmp_path / "run", resolved(federation(), source))
    kept = load(tmp_path / "run" / "federation.yaml", FederationConfig)
    assert kept == resolved(federation(), source)
    assert kept.model.path == str(tmp_path / "models/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("found", ["run.json", "events.jsonl", "metrics.jsonl", "report.html"])
def test_folder_that_holds_a_run_is_refused_and_stays_as_it_was(tmp_path: Path, found: str) -> None:
    (tmp_path / found).write_text("old")
    with pytest.raises(RunFolderError, match=rf"already holds a run \({found}\); choose another `name`"):
        RunFolder.create(tmp_path, federation())
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(found, "old")]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"run folder .*/file/run cannot be (written|read)"):
        RunFolder.create(tmp_path / "file" / "run", federation())


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", federation())
    folder.metrics({"round": 1, "client": "a", "phase": "train", "train": {"loss": math.nan, "x": math.inf, "y": 1.5}})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["train"] == {"loss": None, "x": None, "y": 1.5}


def test_reader_ignores_a_line_that_is_still_being_written_and_names_a_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert read_lines(file) == []
    file.write_bytes(b'{"a": 1}\n{"b": "\xc3')
    assert read_lines(file) == [{"a": 1}]
    file.write_text('{"a": 1}\nx\n')
    with pytest.raises(RunFolderError, match=r"events\.jsonl, line 2: not valid JSON"):
        read_lines(file)


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    run = completed(tmp_path / "run")
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = {e.step: e.value for e in board.Scalars("evaluate/loss/site-a")}
    records = [r for r in read_lines(run / "metrics.jsonl") if r["client"] == "site-a" and r["phase"] == "evaluate"]
    assert losses == pytest.approx({r["round"]: r["evaluate"]["loss"] for r in records})


def test_one_server_at_a_time_writes_to_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert not in_use(path)
    first = RunFolder.create(path, federation())
    assert in_use(path)
    with pytest.raises(RunFolderError, match=r"run: another server is at work on this run"):
        RunFolder.reopen(path, federation())
    first.close()
    assert not in_use(path)
    RunFolder.reopen(path, federation()).close()
