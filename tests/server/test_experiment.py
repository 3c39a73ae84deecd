"""Experiments: what is refused before anything runs, what picks a learning rate, and how an interrupted one goes on."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from server.experiment import main
from server.experiment_config import load_experiment
from server.experiment_plan import Plan
from server.run_folder import read_lines
from tests.processes.launcher import ROOT, environment
from tests.tiny import make_federation, make_shard

SIZES = {"site-a": 9, "site-b": 17}


def make_experiment(folder: Path, **changes: Any) -> Path:
    """An experiment on two tiny sites; ``changes`` are merged in, dotted keys with ``__``."""
    make_federation(folder, SIZES)
    make_shard(folder / "test.jsonl", 6, 40)
    data = {"prompt": "term", "answer": "title"}
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
            "validation": {"path": "server.jsonl", **data},
            "test": {"path": "test.jsonl", **data},
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


def test_every_combination_becomes_a_setting_and_every_strategy_has_its_own_rates(tmp_path: Path) -> None:
    own = [{"name": "fedit"}, {"name": "ffa-lora", "learning_rates": [0.1]}]
    file = make_experiment(
        tmp_path,
        grid__strategies=[*own, {"name": "ffa-lora", "label": "ffa-mlp", "modules": "mlp"}],
        grid__ranks=[4, 2],
        scales={"quick": {"grid": {"ranks": [1]}, "federation": {"rounds": 1}}},
    )
    found = plan(file)
    assert [s.name for s in found.settings] == [
        f"{strategy}_n2_r{rank}" for rank in (4, 2) for strategy in ("fedit", "ffa-lora", "ffa-mlp")
    ]
    fedit, ffa, mlp = found.settings[:3]
    assert [c.learning_rate for c in found.selection(fedit)] == [1e-3, 3e-2]
    assert found.selection(ffa) == []  # one rate: nothing to pick
    assert [c.learning_rate for c in found.selection(mlp)] == [1e-3, 3e-2]
    assert [c.folder for c in found.final(ffa, 0.1)] == [f"final/ffa-lora_n2_r4_lr0.1_seed{s}" for s in (0, 1)]
    cell = found.federation(found.final(mlp, 3e-2)[1])
    assert (cell.strategy.name, cell.strategy.rank, cell.training.seed) == ("ffa-lora", 4, 1)
    assert cell.cohort.min_clients == 2
    quick = plan(file, "quick")
    assert [s.rank for s in quick.settings] == [1, 1, 1]
    assert quick.federation(quick.final(quick.settings[0], 1e-3)[0]).rounds == 1


def test_only_final_cells_know_the_test_set(tmp_path: Path) -> None:
    found = plan(make_experiment(tmp_path))
    for cell in found.cells():
        told = found.federation(cell).model_dump_json()
        assert ("test.jsonl" in told, "server.jsonl" in told) == (cell.final, not cell.final)


@pytest.mark.parametrize(("select_by", "generated"), [("loss", 0), ("rouge_l", 3)])
def test_cells_that_pick_a_rate_generate_only_if_it_is_picked_by_that(
    tmp_path: Path, select_by: str, generated: int
) -> None:
    found = plan(make_experiment(tmp_path, federation__evaluation__generate=3, select_by=select_by))
    told = {(cell.final, found.federation(cell).evaluation.generate) for cell in found.cells()}
    assert told == {(False, generated), (True, 3)}


def test_partition_folders_are_found_by_alpha(tmp_path: Path) -> None:
    file = make_experiment(tmp_path, data__sites={2: "sites-{alpha}"}, grid__alphas=[0.5, 10.0])
    for alpha in (0.5, 10.0):
        (tmp_path / f"sites-{alpha}").mkdir()
        for site in SIZES:
            told = yaml.safe_load((tmp_path / f"{site}.yaml").read_text())
            told["data"]["path"] = f"../{site}.jsonl"
            (tmp_path / f"sites-{alpha}" / f"{site}.yaml").write_text(yaml.safe_dump(told))
    found = plan(file)
    assert [s.alpha for s in found.settings] == [0.5, 10.0]
    assert found.sites[2, 0.5] == [tmp_path / "sites-0.5" / f"{site}.yaml" for site in SIZES]
    (tmp_path / "sites-0.5" / "site-b.yaml").unlink()
    assert main([str(file), "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid__seeds": []}, ["`grid.seeds` is []"]),
        ({"grid__seeds": [0, 1, 0]}, ["`grid.seeds`", "0 appears twice"]),
        ({"grid__learning_rates": [-1.0]}, ["`grid.learning_rates.0` is -1.0"]),
        ({"grid__rates": [1.0]}, ["unknown key `grid.rates`"]),
        ({"grid__clients": [3]}, ["`grid.clients` has 3", "keys of `data.sites`: 2"]),
        ({"grid__alphas": [0.5]}, ["`data.sites.2`", "has no {alpha}"]),
        ({"data__sites": {2: ["site-a.yaml"]}}, ["`data.sites.2`", "lists 1 site files, must be 2"]),
        ({"data__sites": {2: ["site-a.yaml", "site-a.yaml"]}}, ["`name` 'site-a' is also the name"]),
        ({"data__test": {"path": "x.jsonl", "prompt": "a", "answer": "b"}}, ["`data.test.path`", "does not exist"]),
        ({"federation__strategy": "fedit"}, ["`strategy` is decided by the experiment; give `grid.strategies`"]),
        ({"federation__training": {"learning_rate": 0.1}}, ["`training.learning_rate`", "`grid.learning_rates`"]),
        ({"grid__local_steps": [1]}, ["`federation.training.local_steps` and `grid.local_steps`"]),
        ({"grid__strategies": [{"name": "fedit"}, {"name": "fedit"}]}, ["fedit appears twice", "`label`"]),
        ({"grid__strategies": [{"name": "fedit", "rank": 4}]}, ["`rank` of fedit and `grid.ranks`"]),
        ({"grid__strategies": [{"name": "fedfit"}]}, ["cell select/fedfit_n2_r2_lr0.001_seed0", "did you mean"]),
        (
            {"grid__strategies": [{"name": "fedit"}, {"name": "flexlora"}], "federation__aggregation": "median"},
            ["cell select/flexlora_n2_r2_lr0.001_seed0", "flexlora averages products"],
        ),
        ({"federation__roundz": 3}, ["cell select/fedit_n2_r2_lr0.001_seed0", "unknown key `roundz`"]),
        ({"select_by": "accuracy"}, ["`select_by` is 'accuracy'", "loss"]),
    ],
)
def test_what_is_impossible_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    file = make_experiment(tmp_path, **changes)
    assert main([str(file), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in [str(file.parent), *words]), told
    assert not (tmp_path / "out").exists()


def test_unknown_scale_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_experiment(tmp_path, scales={"quick": {"federation": {"rounds": 1}}})
    assert main([str(file), "--scale", "quik", "--out", str(tmp_path / "out")]) == 2
    assert "no scale 'quik'; allowed: quick" in capsys.readouterr().err


@dataclass
class Story:
    """An experiment that was interrupted, had a broken test set, and was brought to its end."""

    out: Path
    interrupted: int
    survivors: list[str]
    with_broken_test_set: int
    complaint: str
    to_the_end: int
    picked: list[float]  # seconds since the epoch when the selection's cells ended, before the last call


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("experiment")
    file, out = make_experiment(folder), folder / "out"
    test = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").write_text('{"term": "broken"}\n')
    command = [sys.executable, "-m", "server.experiment", str(file), "--out", str(out)]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    while first.poll() is None and not list(out.glob("*/*/checkpoints/round-*")):
        time.sleep(0.02)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    interrupted = first.wait(60)
    _, left = psutil.wait_procs(children, timeout=60)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    second = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    picked = [path.stat().st_mtime for path in sorted(out.glob("select/*/run.json"))]
    (folder / "test.jsonl").write_text(test)
    third = main([str(file), "--out", str(out)])
    return Story(
        out, interrupted, [str(p) for p in left], second.returncode, second.stdout + second.stderr, third, picked
    )


def scores(cell: Path) -> dict[int, float]:
    records = read_lines(cell / "metrics.jsonl")
    return {r["round"]: r["evaluate"]["loss"] for r in records if r["client"] == "server" and r["phase"] == "evaluate"}


def test_interrupted_experiment_ends_all_its_processes_and_goes_on_after_the_last_round(story: Story) -> None:
    assert story.interrupted == 130
    assert story.survivors == []
    assert re.search(r"final/\S+: failed.*; about .* left\)$", story.complaint, re.MULTILINE)
    events = [e for f in story.out.glob("*/*/events.jsonl") for e in read_lines(f)]
    (resumed,) = [event for event in events if event["event"] == "resumed"]
    assert resumed["round"] >= 1
    for cell in [*story.out.glob("select/*"), *story.out.glob("final/*")]:
        assert sorted(scores(cell)) == list(range(7))  # each round once


def test_learning_rate_is_picked_without_a_look_at_the_test_set(story: Story) -> None:
    """The test set could not be read while rates were picked."""
    assert story.with_broken_test_set == 1
    assert "has no column 'title'" in story.complaint
    losses = {float(cell.name.split("_lr")[1].split("_")[0]): scores(cell)[6] for cell in story.out.glob("select/*")}
    (setting,) = json.loads((story.out / "experiment.json").read_text())["settings"]
    assert setting["learning_rate"] == min(losses, key=lambda rate: losses[rate])
    assert {t["learning_rate"]: t["score"] for t in setting["tried"]} == losses


def test_finished_cells_are_skipped_and_failed_ones_tried_again(story: Story) -> None:
    assert story.to_the_end == 0
    assert [path.stat().st_mtime for path in sorted(story.out.glob("select/*/run.json"))] == story.picked
    finals = sorted(story.out.glob("final/*"))
    assert [json.loads((cell / "cell.json").read_text())["seed"] for cell in finals] == [0, 1]
    assert scores(finals[0]) != scores(finals[1])
    assert not list(story.out.glob("*/*/checkpoints"))
    assert (story.out / "comparison.html").exists()
    ended = [path.stat().st_mtime for path in finals]
    assert main([str(story.out.parent / "experiment.yaml"), "--out", str(story.out)]) == 0
    assert [path.stat().st_mtime for path in finals] == ended


def test_cells_of_another_experiment_are_not_mixed_in(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    file = story.out.parent / "experiment.yaml"
    changed = yaml.safe_load(file.read_text())
    changed["federation"]["rounds"] = 7
    other = file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    assert main([str(other), "--out", str(story.out)]) == 2
    assert "`rounds` was 6, is 7; choose another --out" in capsys.readouterr().err
