"""Damaged and foreign folders: one error that names the file, and a comparison of what is whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from deploy.experiment.plan import Plan
from tests.deploy.experiment import test_compare
from tests.deploy.experiment.test_experiment import make_experiment, nothing_runs, plan, pretend

out = test_compare.out
CELL = "final/0-0"


def summary(**changes: Any) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        told = json.loads((out / "experiment.json").read_text())
        (out / "experiment.json").write_text(json.dumps(told | changes))

    return change


def setting(**changes: Any) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        told = json.loads((out / "experiment.json").read_text())
        told["settings"][0] |= changes
        (out / "experiment.json").write_text(json.dumps(told))

    return change


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text(text)


def cut(out: Path) -> None:
    """As a disk that was full, or a copy that was stopped."""
    file = out / CELL / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a foreign file": (written("experiment.json", '{"steps": 5}'), "experiment.json: missing key `name`"),
    "a list": (written("experiment.json", "[]"), "experiment.json: must be a section with the keys `name`"),
    "half a summary": (written("experiment.json", '{"name": "x", "sel'), "experiment.json cannot be read"),
    "a deep summary": (written("experiment.json", "[" * 100_000), "experiment.json cannot be read"),
    "a score that is none": (summary(select_by="vibes"), "`select_by`: 'vibes' is no score"),
    "half a claim": (summary(claims=[{"better": "fedit"}]), "missing key `claims.0.than`"),
    "cells that are none": (setting(cells=None), "`settings.0.cells` is None"),
    "cells elsewhere": (setting(cells=["../x"]), "`settings.0.cells`: ../x is no folder of this experiment"),
    "half of the numbers": (cut, "metrics.jsonl does not hold all of 2 rounds"),
    "no numbers": (written(f"{CELL}/metrics.jsonl", ""), "final/0-0: a file of this run is damaged"),
    "numbers of another program": (written(f"{CELL}/metrics.jsonl", "[1]\n"), "metrics.jsonl, line 1: not valid JSON"),
    "numbers that are none": (
        written(f"{CELL}/metrics.jsonl", '{"phase": "evaluate", "client": "server", "round": 0, "evaluate": null}\n'),
        "final/0-0: a file of this run is damaged",
    ),
    "half an outcome": (written(f"{CELL}/run.json", "{"), "final/0-0/run.json cannot be read"),
    "no outcome": (written(f"{CELL}/run.json", "null"), "final/0-0/run.json cannot be read"),
    "a run without a seed": (written(f"{CELL}/cell.json", "{}"), "final/0-0: a file of this run is damaged (KeyError"),
    "half of the answers": (written(f"{CELL}/samples.json", '[{"pro'), "final/0-0: a file of this run is damaged"),
    "other answers": (written(f"{CELL}/samples.json", '[{"a": 1}]'), "final/0-0: a file of this run is damaged"),
}


def test_damage_is_one_line_that_names_the_file_and_nothing_is_written(
    out: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, (damage, says) in DAMAGE.items():
        folder = tmp_path_factory.mktemp("damaged") / "out"
        shutil.copytree(out, folder)
        damage(folder)
        assert main(["compare", str(folder)]) == 2, what
        told = capsys.readouterr()
        assert told.err.startswith("error: "), what
        assert says in told.err, what
        assert told.err.count("\n") == 1, what
        assert not list(folder.glob("comparison*")), what


def test_runs_that_are_gone_are_missing(out: Path) -> None:
    for number in range(3):
        shutil.rmtree(out / f"final/0-{number}")
    assert main(["compare", str(out)]) == 0
    assert "7 of 12 runs are not there" in (out / "comparison.html").read_text()


def test_claim_that_was_taken_back_leaves_no_file(out: Path) -> None:
    summary(claims=[{"better": "flexlora", "than": ["fedit"]}])(out)
    assert main(["compare", str(out)]) == 0
    files = {file.name for file in out.glob("comparison-claims.*")}
    assert files == {"comparison-claims.csv", "comparison-claims.svg"}
    summary(claims=[])(out)
    assert main(["compare", str(out)]) == 0
    assert not list(out.glob("comparison-claims.*"))


def test_folder_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = make_experiment(tmp_path), tmp_path / "out"
    nothing_runs(monkeypatch)
    for name, content, says in [
        (
            "experiment.json",
            json.dumps({"name": "other", "select_by": "loss", "settings": [], "partitions": []}),
            "'other'",
        ),
        ("experiment.json", '{"steps": 5}', "experiment.json: missing key `name`"),
        ("run.json", "{}", "already holds a run (run.json)"),
    ]:
        out.mkdir()
        (out / name).write_text(content)
        assert main(["experiment", str(file), "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
        assert [found.name for found in out.iterdir()] == [name]
        shutil.rmtree(out)
    out.write_text("a file")
    assert main(["experiment", str(file), "--out", str(out)]) == 2
    assert f"{out}" in capsys.readouterr().err


def test_cell_with_a_damaged_file_is_named_when_the_experiment_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = make_experiment(tmp_path), tmp_path / "out"
    found = plan(file)
    cell = found.selection(found.settings[0])[0]
    pretend(out, found, cell, 2.0)
    nothing_runs(monkeypatch)
    capsys.readouterr()  # transformers shows its progress
    for name in ("federation.yaml", "cell.json", "metrics.jsonl", "run.json"):
        before = (out / cell.folder / name).read_text()
        (out / cell.folder / name).write_text('"half')
        assert main(["experiment", str(file), "--out", str(out)]) == 2, name
        told = capsys.readouterr().err
        assert f"{out / cell.folder}" in told, name
        assert told.count("\n") == 1, name
        (out / cell.folder / name).write_text(before)


@pytest.mark.parametrize("rates", [[1e-3, 1.00001e-3], [1e-200, 1e200], [1e-4, 1e300]])
def test_ratio_that_leads_nowhere_adds_no_rate(tmp_path: Path, rates: list[float]) -> None:
    found: Plan = plan(make_experiment(tmp_path, grid__learning_rates=rates, grid__extend=3))
    (chosen,) = found.settings
    for best in (None, *rates):
        found.beyond(chosen, best)
    tried = found.rates(chosen)
    assert len(set(tried)) == len(tried)
    assert all(0 < rate < float("inf") for rate in tried)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"grid__extend": 2, "grid__learning_rates": [1e-3]},
            "`extend` is 2, and every strategy has one learning rate",
        ),
        ({"federation__best": {"patience": 2}}, "`best` is decided by the experiment; give `score_at` best"),
        ({"grid__learning_rates": [1e-3, float("inf")]}, "`grid.learning_rates.1` is inf"),
    ],
)
def test_option_without_effect_or_with_a_wrong_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    assert main(["experiment", str(make_experiment(tmp_path, **changes)), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
