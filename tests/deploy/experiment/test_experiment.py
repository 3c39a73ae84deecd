"""Experiments: what is refused before anything runs, what picks a learning rate, and how an interrupted one goes on."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from common.errors import DataError, DivergedError, DivergedUpdate, TrainingError, kind_of
from deploy.cli import main
from deploy.experiment.config import load_experiment
from deploy.experiment.places.queue import Queue
from deploy.experiment.plan import Cell, Plan
from deploy.experiment.trial import prepare
from deploy.sandbox.tiny import make_federation, make_shard
from server.run.folder import read_lines
from tests.harness.processes import ROOT, environment

SIZES = {"site-a": 9, "site-b": 17}
TERMS = {"prompt": "term", "answer": "title"}
CLASSIFY = {
    "federation__task": {"type": "sequence-classification", "labels": ["x", "y"]},
    "grid__strategies": [{"name": "fedit", "head": "train"}],
}


def make_experiment(folder: Path, **changes: Any) -> Path:
    """An experiment on two tiny sites; ``changes`` are merged in, dotted keys with ``__``."""
    make_federation(folder, SIZES)
    make_shard(folder / "test.jsonl", 6, 40)
    experiment: dict[str, Any] = {
        "name": "tiny",
        "federation": {
            "model": {"path": "model"},
            "rounds": 6,
            "training": {"batch_size": 4, "max_length": 64, "local_steps": 2},
            "evaluation": {"max_examples": 4, "generate": 0, "max_new_tokens": 4, "samples": 2},
        },
        "data": {
            "sites": {2: [f"{site}.yaml" for site in SIZES]},
            "validation": {"path": "server.jsonl", **TERMS},
            "test": {"path": "test.jsonl", **TERMS},
        },
        "grid": {
            "strategies": [{"name": "fedit", "modules": "linear"}],
            "clients": [2],
            "ranks": [2],
            "learning_rates": [1e-3, 3e-2],
            "seeds": [0, 1],
        },
    }
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        within = experiment
        for section in sections:
            within = within[section]
        within[leaf] = value
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    return file


def plan(file: Path, scale: str | None = None) -> Plan:
    return Plan(load_experiment(file, scale), file)


def pretend(out: Path, found: Plan, cell: Cell, score: float | None = None, **outcome: str) -> None:
    """Write the folder of a cell that has ended well with a score, or as ``outcome`` says."""
    folder = out / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").write_text(json.dumps(found.facts(cell)))
    (folder / "federation.yaml").write_text(yaml.safe_dump(found.federation(cell).model_dump(mode="json")))
    (folder / "run.json").write_text(json.dumps(outcome or {"status": "completed"}))
    told = {"round": 6, "client": "server", "phase": "evaluate", "evaluate": {"loss": score, "examples": 4.0}}
    moved = {"round": 6, "client": "site-a", "phase": "train", "bytes": {"down": 1, "up": 1}, "seconds": {"train": 1}}
    (folder / "metrics.jsonl").write_text(json.dumps(moved) + "\n" + json.dumps(told) + "\n")


def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queue, "run", lambda *_: None)


FAILED = {"status": "failed", "reason": "1 valid updates, 2 needed", "causes": {"site-a": kind_of(TrainingError())}}
DIVERGED = {**FAILED, "causes": {"site-a": kind_of(DataError()), "site-b": kind_of(DivergedError())}}
LARGE = {**FAILED, "causes": {"site-a": kind_of(DivergedUpdate())}}
EMPTY = {"status": "failed", "reason": "1 of 2 sites joined", "causes": {}}


@pytest.mark.parametrize(
    ("outcome", "code", "told"),
    [(FAILED, 1, "failed"), (EMPTY, 1, "failed"), (DIVERGED, 0, "diverged"), (LARGE, 0, "diverged")],
)
def test_learning_rate_without_a_score_is_named_and_counts_as_an_error_unless_it_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Any], code: int, told: str
) -> None:
    file, out = make_experiment(tmp_path), tmp_path / "out"
    found = plan(file)
    (setting,) = found.settings
    low, high = found.selection(setting)
    pretend(out, found, low, 2.0)
    pretend(out, found, high, **outcome)
    for cell in found.final(setting, 1e-3):
        pretend(out, found, cell, 2.5)
    nothing_runs(monkeypatch)
    assert main(["experiment", str(file), "--out", str(out)]) == code
    told = f"0.03 ({told})"
    for name in ("comparison.html", "comparison.md"):
        assert f"Learning rates without a score: FedIT with 2 clients, rank 2: {told}" in (out / name).read_text()
    with (out / "comparison.csv").open() as lines:
        assert {line["rates_without_score"] for line in csv.DictReader(lines)} == {told}


def test_strategy_whose_learning_rates_all_failed_is_in_the_table_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = make_experiment(tmp_path), tmp_path / "out"
    found = plan(file)
    for cell in found.selection(found.settings[0]):
        pretend(out, found, cell, **DIVERGED)
    nothing_runs(monkeypatch)
    assert main(["experiment", str(file), "--out", str(out)]) == 1
    with (out / "comparison.csv").open() as lines:
        (line,) = csv.DictReader(lines)
    assert (line["strategy"], line["measure"], line["seeds"]) == ("fedit", "", "0")
    assert line["rates_without_score"] == "0.001 (diverged); 0.03 (diverged)"


def test_mistake_in_the_test_set_can_be_mended_after_the_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = make_experiment(tmp_path), tmp_path / "out"
    found = plan(file)
    (setting,) = found.settings
    for cell, score in zip(found.selection(setting), (2.0, 3.0), strict=True):
        pretend(out, found, cell, score)
    first, second = found.final(setting, 1e-3)
    for cell in (first, second):
        pretend(out, found, cell, **FAILED)
    mended = yaml.safe_load(file.read_text())
    mended["data"]["test"]["answer"] = "{title}!"
    file.write_text(yaml.safe_dump(mended))
    nothing_runs(monkeypatch)
    assert main(["experiment", str(file), "--out", str(out)]) == 1  # the final cells are still to be run
    pretend(out, found, first, 2.0)  # one of them with the test set as it was
    assert main(["experiment", str(file), "--out", str(out)]) == 2
    assert "`evaluation.server.answer` was 'title', is '{title}!'" in capsys.readouterr().err


def test_interrupt_leaves_the_results_that_earlier_calls_have_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = make_experiment(tmp_path, grid__strategies=[{"name": "fedit"}, {"name": "flexlora"}]), tmp_path / "out"
    found = plan(file)
    fedit, flexlora = found.settings

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Queue, "run", interrupt)
    assert main(["experiment", str(file), "--out", str(out)]) == 130
    assert not (out / "comparison.md").exists()  # there is nothing to compare
    for cell, score in zip(found.selection(fedit), (3.0, 2.0), strict=True):
        pretend(out, found, cell, score)
    pretend(out, found, found.selection(flexlora)[0], 2.0)
    pretend(out, found, found.final(fedit, 3e-2)[0], 2.25)
    assert main(["experiment", str(file), "--out", str(out)]) == 130
    settings = json.loads((out / "experiment.json").read_text())["settings"]
    assert [setting["learning_rate"] for setting in settings] == [3e-2, None]
    assert "| FedIT | 0.03† | 1 | **2.250** |" in (out / "comparison.md").read_text()
    assert "3 of 4 runs are not there" in (out / "comparison.html").read_text()


@pytest.mark.parametrize("final", [False, True])
def test_killed_cell_goes_on_unless_its_bytes_are_to_be_compared(tmp_path: Path, final: bool) -> None:
    found = plan(make_experiment(tmp_path))
    (setting,) = found.settings
    cell = found.final(setting, 1e-3)[0] if final else found.selection(setting)[0]
    pretend(tmp_path, found, cell, status="running")
    prepared = prepare(tmp_path / cell.folder, found.federation(cell), found.facts(cell))
    assert prepared is not None
    assert prepared[1] != final
    assert (tmp_path / cell.folder / "metrics.jsonl").exists() != final


def test_signal_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        main(["experiment", str(tmp_path / "none.yaml")])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@dataclass
class Story:
    """An experiment that was interrupted, had a broken test set, and was brought to its end."""

    out: Path
    interrupted: int
    survivors: list[str]
    with_broken_test_set: int
    run_until_done: int
    told: str


def of_session(leader: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("experiment")
    file, out = make_experiment(folder), folder / "out"
    command = [sys.executable, "-m", "tests.deploy.experiment.interrupted", "experiment", str(file), "--out", str(out)]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    interrupted = first.wait()
    _, left = psutil.wait_procs(of_session(first.pid), timeout=60)
    test = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").write_text('{"term": "broken"}\n')
    second = main(["experiment", str(file), "--out", str(out)])
    (folder / "test.jsonl").write_text(test)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        third = main(["experiment", str(file), "--out", str(out)])
    return Story(out, interrupted, [str(p) for p in left], second, third, told.getvalue())


def scores(cell: Path) -> dict[int, float]:
    records = read_lines(cell / "metrics.jsonl")
    return {r["round"]: r["evaluate"]["loss"] for r in records if r["client"] == "server" and r["phase"] == "evaluate"}


def ended(cells: list[Path]) -> list[float]:
    return [(cell / "run.json").stat().st_mtime for cell in cells]


def test_interrupted_experiment_ends_all_its_processes_and_goes_on_after_the_last_round(story: Story) -> None:
    assert story.interrupted == 130
    assert story.survivors == []
    assert story.with_broken_test_set == 2
    assert re.search(r"select/\S+: loss \d\.\d+ .*; about .* left\)$", story.told, re.MULTILINE)
    events = [e for f in story.out.glob("*/*/events.jsonl") for e in read_lines(f)]
    (resumed,) = [event for event in events if event["event"] == "resumed"]
    assert resumed["round"] == 2
    for cell in [*story.out.glob("select/*"), *story.out.glob("final/*")]:
        assert sorted(scores(cell)) == list(range(7))  # each round once


def test_learning_rate_is_picked_by_the_validation_set(story: Story) -> None:
    losses = {float(cell.name.split("_lr")[1].split("_")[0]): scores(cell)[6] for cell in story.out.glob("select/*")}
    (setting,) = json.loads((story.out / "experiment.json").read_text())["settings"]
    assert setting["learning_rate"] == min(losses, key=lambda rate: losses[rate])
    assert {t["learning_rate"]: t["score"] for t in setting["tried"]} == losses


def test_finished_cells_are_skipped_and_failed_ones_tried_again(story: Story) -> None:
    assert story.run_until_done == 0
    finals, selection = sorted(story.out.glob("final/*")), sorted(story.out.glob("select/*"))
    assert [json.loads((cell / "cell.json").read_text())["seed"] for cell in finals] == [0, 1]
    assert scores(finals[0]) != scores(finals[1])
    assert not list(story.out.glob("*/*/checkpoints"))
    assert (story.out / "comparison.html").exists()
    before, expected = ended([*selection, *finals]), scores(finals[1])
    (finals[1] / "run.json").write_text(json.dumps(FAILED))
    (finals[1] / "metrics.jsonl").unlink()
    assert main(["experiment", str(story.out.parent / "experiment.yaml"), "--out", str(story.out)]) == 0
    assert ended([*selection, finals[0]]) == before[:-1]
    assert scores(finals[1]) == expected


def test_cells_of_another_experiment_are_not_mixed_in(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    file = story.out.parent / "experiment.yaml"
    changed = yaml.safe_load(file.read_text())
    changed["federation"]["rounds"] = 7
    other = file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    assert main(["experiment", str(other), "--out", str(story.out)]) == 2
    assert "`rounds` was 6, is 7; choose another --out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and file of an experiment whose larger rate diverges, on sites that allow as many rounds as one run."""
    folder = tmp_path_factory.mktemp("limited")
    file = make_experiment(folder, federation__rounds=2, grid__learning_rates=[1e-3, 1e30])
    for site in SIZES:
        told = yaml.safe_load((folder / f"{site}.yaml").read_text())
        (folder / f"{site}.yaml").write_text(yaml.safe_dump({**told, "policy": {**told["policy"], "max_rounds": 2}}))
    return main(["experiment", str(file), "--out", str(folder / "out")]), file


def test_sites_limits_and_ledgers_are_those_of_one_cell(limited: tuple[int, Path]) -> None:
    code, file = limited
    assert code == 0
    assert len(list(file.parent.glob("out/final/*/metrics.jsonl"))) == 2
    assert not list(file.parent.rglob("*ledger*"))


def test_rate_that_diverges_loses_and_is_not_tried_again(limited: tuple[int, Path]) -> None:
    _, file = limited
    out = file.parent / "out"
    (setting,) = json.loads((out / "experiment.json").read_text())["settings"]
    assert setting["learning_rate"] == 1e-3
    assert [tried["status"] for tried in setting["tried"]] == ["completed", "diverged"]
    before = ended(sorted(out.glob("*/*")))
    assert main(["experiment", str(file), "--out", str(out)]) == 0
    assert ended(sorted(out.glob("*/*"))) == before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("site-b.jsonl", "site-b.yaml: other content"),
        ("site-b.yaml", "site-b.yaml: other content"),
        ("server.jsonl", "data.validation: other content"),
        ("test.jsonl", "data.test: other content"),
    ],
)
def test_cells_with_other_data_are_not_mixed_in(
    limited: tuple[int, Path], capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    _, file = limited
    changed, command = file.parent / name, ["experiment", str(file), "--out", str(file.parent / "out")]
    before = changed.read_text()
    changed.write_text(before.replace("hand", "knee") + "\n")
    try:
        assert main(command) == 2
    finally:
        changed.write_text(before)
    assert f"{told}; choose another --out" in capsys.readouterr().err


def test_cells_with_other_sites_are_not_mixed_in(
    limited: tuple[int, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of an earlier version, which noted no digests and are accepted as long as the sites are the same."""
    _, file = limited
    out = file.parent / "out"
    nothing_runs(monkeypatch)
    for facts in out.glob("*/*/cell.json"):
        told = json.loads(facts.read_text())
        del told["digests"]
        facts.write_text(json.dumps(told))
    assert main(["experiment", str(file), "--out", str(out)]) == 0
    other = yaml.safe_load(file.read_text())
    (file.parent / "more").mkdir()
    moved = file.parent / "more" / "site-b.yaml"
    moved.write_text((file.parent / "site-b.yaml").read_text().replace("site-b.jsonl", "../site-b.jsonl"))
    other["data"]["sites"] = {2: ["site-a.yaml", "more/site-b.yaml"]}
    file.with_name("other.yaml").write_text(yaml.safe_dump(other))
    assert main(["experiment", str(file.with_name("other.yaml")), "--out", str(out)]) == 2
    assert f"`data.sites` has other files: {moved}" in capsys.readouterr().err
