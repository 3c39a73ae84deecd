"""What an experiment will run, and what it refuses before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cli import main
from tests.deploy.experiment.test_experiment import CLASSIFY, SIZES, TERMS, make_experiment, plan


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
    assert main(["experiment", str(file), "--out", str(tmp_path / "out")]) == 2


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
        ({"data__test": {"path": "x.jsonl", "prompt": "a", "answer": "b"}}, ["`data.test`: shard", "does not exist"]),
        ({"data__test": {**TERMS, "path": "test.jsonl", "answer": "titel"}}, ["`data.test`: ", "did you mean 'title'"]),
        ({"data__test": {**TERMS, "path": "./server.jsonl"}}, ["`data.validation.path` and `data.test.path` are the"]),
        ({"data__label": "chapter"}, ["`data.label`: ", "site-a.yaml", "has no column 'chapter'"]),
        (CLASSIFY, ["`data.validation`: shard", "6 of 6 rows", "have a label that is not in task.labels"]),
        (
            {
                **CLASSIFY,
                "grid__strategies": [{"name": "fedit", "head": "train"}, {"name": "flexlora", "head": "local"}],
            },
            ["cell select/flexlora_n2_r2_lr0.001_seed0", "`strategy.head` local keeps"],
        ),
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
    assert main(["experiment", str(file), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in [str(file.parent), *words]), told
    assert not (tmp_path / "out").exists()


def test_unknown_scale_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_experiment(tmp_path, scales={"quick": {"federation": {"rounds": 1}}})
    assert main(["experiment", str(file), "--scale", "quik", "--out", str(tmp_path / "out")]) == 2
    assert "no scale 'quik'; allowed: quick" in capsys.readouterr().err


def test_rows_that_cannot_be_used_are_one_error_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_experiment(tmp_path)
    (tmp_path / "site-b.jsonl").write_text('{"term": "x", "title": ""}\n')
    assert main(["experiment", str(file), "--out", str(tmp_path / "out")]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    for word in (str(file), f"`data.sites.2`: {tmp_path / 'site-b.yaml'}: ", "row 1: column 'title' is empty"):
        assert word in told
    assert not (tmp_path / "out").exists()
