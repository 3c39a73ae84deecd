"""Long experiments: rates beyond the file's, the round that is scored, and claims that are tested over the seeds."""

import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from deploy.cli import main
from deploy.experiment.compare_claims import Paired
from deploy.experiment.places.queue import Queue
from deploy.experiment.plan import Cell
from deploy.experiment.run import Experiment
from tests.deploy.experiment.test_experiment import make_experiment, pretend


def run_without_training(monkeypatch: pytest.MonkeyPatch, out: Path, best: dict[str, float]) -> list[str]:
    """Pretend the cells: the loss is smallest at a strategy's best rate, after round 4. The folders of all cells.

    Far from its best rate a strategy diverges; one without a best rate fails at every rate.
    """
    ran = []

    def cells(self: Experiment, what: str, wanted: list[Cell]) -> None:
        del what
        for cell in wanted:
            ran.append(cell.folder)
            found, own = self._plan, best.get(cell.setting.strategy, 0.0)
            distance = math.log2(cell.learning_rate / own) if own else math.inf
            if distance > 2:
                cause = "DivergedError" if distance < math.inf else "ConfigError"
                pretend(out, found, cell, **{"status": "failed", "reason": "by a site", "causes": {"a": cause}})
                continue
            pretend(out, found, cell)
            lines = [(out / cell.folder / "metrics.jsonl").read_text().splitlines()[0]]
            for number in (0, 2, 4, 6):
                loss = 1 + abs(distance) + abs(number - 4) + 0.01 * cell.seed + (cell.setting.strategy == "fedit")
                told = {"round": number, "client": "server", "phase": "evaluate", "evaluate": {"loss": loss}}
                moved = {"round": number, "client": "site-a", "phase": "train", "bytes": {"down": 1, "up": 1}}
                lines += (
                    [json.dumps(told), json.dumps({**moved, "seconds": {"train": 1}})] if number else [json.dumps(told)]
                )
            (out / cell.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(Queue, "run", cells)
    return ran


def words_of_figure(out: Path) -> set[str]:
    drawn = ElementTree.parse(out / "comparison-claims.svg")  # noqa: S314 - written here
    return {"".join(text.itertext()).strip() for text in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_rates_go_on_beyond_the_file_until_the_best_is_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upwards, downwards past a rate that diverges, and no further than ``extend``."""
    strategies = [{"name": name, "modules": "linear"} for name in ("fedit", "ffa-lora", "flexlora")]
    file = make_experiment(
        tmp_path,
        grid__strategies=strategies,
        grid__learning_rates=[0.01, 0.02],
        grid__extend=3,
        score_at="best",
        claims=[{"better": "flexlora", "than": ["fedit", "ffa-lora"]}],
    )
    out = tmp_path / "out"
    ran = run_without_training(monkeypatch, out, {"fedit": 0.041, "ffa-lora": 0.0049, "flexlora": 10.0})
    assert main(["experiment", str(file), "--out", str(out)]) == 0
    told = {s["strategy"]: s for s in json.loads((out / "experiment.json").read_text())["settings"]}
    assert [t["learning_rate"] for t in told["fedit"]["tried"]] == [0.01, 0.02, 0.04, 0.08]
    assert [t["learning_rate"] for t in told["ffa-lora"]["tried"]] == [0.01, 0.02, 0.005, 0.0025]
    assert [t["learning_rate"] for t in told["flexlora"]["tried"]] == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert {name: (s["learning_rate"], s["round"]) for name, s in told.items()} == {
        "fedit": (0.04, 4), "ffa-lora": (0.005, 4), "flexlora": (0.16, 4),
    }  # fmt: skip
    text = (out / "comparison.md").read_text()
    assert "| FedIT | 0.04 | 4 | 2 |" in text
    assert "| FlexLoRA | 0.16† | 4 | 2 |" in text
    assert "in the round that was best on the validation set" in text
    assert "| 2 clients, rank 2 | FedIT |" in text
    with (out / "comparison-claims.csv").open() as stream:
        claims = {row["than"]: row for row in csv.DictReader(stream)}
    assert float(claims["fedit"]["gain"]) == pytest.approx(2.0365 - 6.966, abs=1e-3)  # 1 + |log2(rate / best)| ...
    assert (claims["ffa-lora"]["verdict"], claims["ffa-lora"]["plateau"]) == ("worse", "True")
    assert {"FlexLoRA is better", "than FedIT", "than FFA-LoRA", "2 clients, rank 2"} <= words_of_figure(out)
    before = len(ran)
    assert main(["experiment", str(file), "--out", str(out)]) == 0  # called again it comes to the same
    assert {s["strategy"]: s for s in json.loads((out / "experiment.json").read_text())["settings"]} == told
    assert len(ran) == 2 * before  # nothing is skipped here, where nothing runs; the cells are the same ones
    assert ran[:before] == ran[before:]
    (out / "experiment.json").write_text((out / "experiment.json").read_text().replace('"round": 4', '"round": 6'))
    assert main(["compare", str(out)]) == 0
    assert {"than FedIT‡", "than FFA-LoRA‡"} <= words_of_figure(out)


def test_strategy_that_fails_at_every_rate_is_tried_at_no_further_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model cannot be loaded, say; the others are compared."""
    strategies = [{"name": name, "modules": "linear"} for name in ("fedit", "flexlora")]
    file = make_experiment(
        tmp_path, grid__strategies=strategies, grid__learning_rates=[0.01, 0.02], grid__extend=3, score_at="best"
    )
    out = tmp_path / "out"
    ran = run_without_training(monkeypatch, out, {"fedit": 0.019})
    assert main(["experiment", str(file), "--out", str(out)]) == 1
    assert len([cell for cell in ran if "flexlora" in cell]) == 2
    assert "| FedIT | 0.02 |" in (out / "comparison.md").read_text()


def test_claim_of_a_strategy_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_experiment(tmp_path, claims=[{"better": "fedit", "than": ["rolora"]}])
    assert main(["experiment", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "`claims` names 'rolora'; strategies of the grid: fedit" in capsys.readouterr().err


@pytest.mark.parametrize(("gain", "verdict"), [(1.0, "better"), (-1.0, "worse"), (0.02, "not decided")])
def test_verdict_is_that_of_scipys_paired_test(gain: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=5)
    first, second = common + gain + 0.1 * rng.normal(size=5), common + 0.1 * rng.normal(size=5)
    scores = [{seed: float(v) for seed, v in enumerate(values)} for values in (first, second)]
    found = Paired.of(*scores, lower_is_better=False)
    assert found is not None
    assert found.p == pytest.approx(float(stats.ttest_rel(first, second).pvalue), rel=1e-9)
    assert found.verdict == verdict
    turned = Paired.of(*scores, lower_is_better=True)
    assert turned is not None
    assert (turned.difference, turned.p) == (pytest.approx(-found.difference), pytest.approx(found.p))


def test_number_of_seeds_needed_decides_four_times_out_of_five() -> None:
    """Against simulated runs; a seed that only one of the two has run counts for nothing."""
    found = Paired.of({0: 0.0, 1: 1.4, 2: 0.4, 9: 5.0}, {0: 0.0, 1: 0.0, 2: 0.4, 8: 7.0}, lower_is_better=False)
    assert found is not None
    assert found.seeds == 3
    needed = found.needed()
    assert needed is not None
    assert found.deviation is not None
    drawn = np.random.default_rng(0).normal(found.difference, found.deviation, size=(4000, needed))
    power = float((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean())
    assert 0.77 < power < 0.88
