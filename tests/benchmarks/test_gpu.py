"""The GPU's benchmark on its CPU twin: every method trains, and what goes wrong is a row of the table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.gpu.case import METHODS, SHAPES, Case, measure
from benchmarks.gpu.energy import Meter

TWIN = run.cases(twin=True)


@pytest.mark.parametrize("case", TWIN, ids=[case.method for case in TWIN])
def test_every_method_trains_the_twin(case: Case) -> None:
    told = measure(case)
    losses = [float(loss) for loss in str(told["losses"]).split()]
    assert len(losses) == case.steps
    assert told["loss last"] == pytest.approx(losses[-1], rel=1e-4)
    assert losses[0] == pytest.approx(6.3, abs=0.5)  # of 512 equally likely tokens
    assert float(told["tokens / s"] or 0) > 0


def test_curves_in_two_types_fall_alike() -> None:
    found = {}
    for case in run.curves(twin=True)[:2]:
        told = measure(replace(case, steps=12))
        found[case.dtype] = [float(loss) for loss in str(told["losses"]).split()]
    assert len(found["float32"]) == 12
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
    assert found["bfloat16"] != found["float32"]


def test_table_of_the_gpu_has_every_method_at_both_sizes() -> None:
    wanted = {(shape, method) for shape in SHAPES if shape != "tiny" for method in METHODS}
    assert {(case.shape, case.method) for case in run.cases(twin=False)} == wanted


def test_case_that_fails_is_a_row_and_time_that_is_over_ends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def in_process(case: Case, seconds: float) -> dict[str, float | str | None]:
        asked.append(seconds)
        if len(asked) == 2:
            return {"fault": "out of memory (80 GB)"}
        return {"tokens / s": 5.0} if seconds > 0 else run_really(case, seconds)

    run_really = run.in_process
    monkeypatch.setattr(run, "in_process", in_process)
    table = run.everything(1e-9, twin=True, out=tmp_path / "gpu.json")
    assert max(asked) <= 1e-9
    assert [row["fault"] for row in table.rows[:3]] == [
        "not run: out of time",
        "out of memory (80 GB)",
        "not run: out of time",
    ]
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == table.rows
    assert len(table.rows) == len(TWIN) + 4


@pytest.mark.long
def test_process_that_dies_or_takes_too_long_is_told() -> None:
    good = run.in_process(TWIN[0], 300)
    assert good.get("fault") is None
    bad = run.in_process(replace(TWIN[0], rank=10_000, method="GaLore"), 300)
    assert "GaLore rank 10000" in str(bad["fault"])
    assert run.in_process(TWIN[0], 1.0) == {"fault": "took longer than 1 s"}


def test_without_a_device_the_benchmark_says_how_to_run_the_twin() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--twin"):
        run.run()


def test_energy_is_told_or_absent() -> None:
    joules = Meter().joules()
    assert joules is None or joules >= 0
