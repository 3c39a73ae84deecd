"""A score is added in one table, and everything that measures, shows or chooses scores knows it."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import ConfigError
from common.metrics import SCORES, Score, scores
from deploy.experiment.compare import write_comparison
from deploy.schemas import FOLDER, schemas
from server.operate.progress import Picture, describe, render
from server.operate.status import show_one
from server.report.write import write_report
from server.run.folder import read_lines
from server.run.state import overview
from tests.deploy.experiment.test_compare import out as out
from tests.deploy.experiment.test_experiment import make_experiment, plan
from tests.harness import sample_run


def excess(predictions: list[str], references: list[str]) -> float:
    """Mean words too many."""
    pairs = zip(predictions, references, strict=True)
    return sum(max(0, len(p.split()) - len(r.split())) for p, r in pairs) / len(references)


EXCESS = Score("excess", "Excess", "words too many", "answers", excess, lower_is_better=True, headline=True, curve=True)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "excess", EXCESS)


@pytest.fixture
def run(added: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that measured it: 5 words too many before, 1 after four rounds."""
    known = sample_run.scores
    monkeypatch.setattr(sample_run, "scores", lambda who, version: {**known(who, version), "excess": 5.0 - version})
    return sample_run.completed(tmp_path / "run")


def shown(what: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.usefixtures("added")
def test_new_score_is_computed_with_the_others_of_its_kind() -> None:
    found = scores("answers", ["a b c", "a"], ["a", "a b"])
    assert found["excess"] == 1.0
    assert found.keys() == {"rouge_l", "bleu_4", "exact_match", "excess"}


def test_new_score_is_told_as_the_run_goes(run: Path) -> None:
    events = read_lines(run / "events.jsonl")
    (last,) = [e for e in events if e["event"] == "evaluated" and e["client"] == "server" and e["round"] == 4]
    assert describe(last).endswith(", excess 1.000")
    picture = Picture()
    for event in events:
        picture.take(event)
    display, status = shown(render(picture, 0.0)), shown(show_one(overview(run)))
    assert "held-out excess" in display
    (server,) = [line.split() for line in display.splitlines() if line.startswith("server")]
    assert server[-1] == "1.000"
    assert "Excess" in status


def test_new_score_is_in_the_report(run: Path) -> None:
    page = write_report(run).read_text()
    assert "excess went from 5.000 to 1.000 (better)" in page
    assert "Excess: words too many." in page
    assert 'aria-label="Excess by round. server 5.000 to 1.000;' in page
    assert "ROUGE-L, BLEU-4, Exact match, Excess: of answers that the model wrote itself." in page


@pytest.mark.usefixtures("added")
def test_new_score_is_compared(out: Path) -> None:
    for number, file in enumerate(sorted(out.glob("final/*/metrics.jsonl"))):
        records = read_lines(file)
        for record in records:
            if record["phase"] == "evaluate":
                record["evaluate"]["excess"] = 7.0 + number - record["round"]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_comparison(out).read_text()
    assert "Best mean excess: FedIT." in page
    assert "| Excess ↓ |" in (out / "comparison.md").read_text()
    assert "Excess, 2 clients, Dirichlet alpha 0.5, rank 8. FedIT 6.000 ± 1.000; " in page


@pytest.mark.usefixtures("added")
def test_new_score_may_pick_the_learning_rate_where_answers_are_generated(tmp_path: Path) -> None:
    found = plan(make_experiment(tmp_path, select_by="excess", federation__evaluation__generate=3))
    assert found.federation(next(found.cells())).evaluation.generate == 3
    with pytest.raises(ConfigError, match=r"`select_by` is 'excess'; measured by this task and evaluation: loss$"):
        plan(make_experiment(tmp_path, select_by="excess", federation__evaluation__generate=0))
    schema = json.loads(schemas()[FOLDER / "experiment.schema.json"])
    assert "excess" in schema["properties"]["select_by"]["enum"]


def test_score_that_says_the_same_as_another_picks_no_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`select_by`: 'perplexity' picks no learning rate; allowed: loss, accuracy,"):
        plan(make_experiment(tmp_path, select_by="perplexity"))
