"""A score, a task or a model family is added in one table, and everything that asks about it knows."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import Linear, ModuleDict, ModuleList, Sequential
from transformers import LlamaModel, OPTConfig, OPTForCausalLM

from client.preflight import shard
from client.preflight.context import CheckContext
from client.preflight.finding import Skip
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.section import ModelSource
from common.config.site import SiteConfig
from common.config.task import CausalLMTask, TaskConfig
from common.data.chat import Example
from common.data.tasks import TASKS, CausalLM, Task, make_task
from common.errors import ConfigError, ModelError
from common.metrics import SCORES, Score, scores
from common.model.base_model import check_length
from common.model.families import SPECIAL, blocks_of, freeze_all_but, select
from deploy import cli
from deploy.experiment.compare import write_comparison
from deploy.sandbox.tiny import make_federation, make_model
from deploy.schemas import FOLDER, schemas
from server.loop.server_model import ServerModel
from server.operate.progress import render
from server.operate.status import show_one
from server.report.write import write_report
from server.run.events import describe
from server.run.folder import read_lines
from server.run.run_progress import RunProgress
from server.run.state import read_state
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
    progress = RunProgress()
    for event in events:
        progress.take(event)
    display, status = shown(render(progress, 0.0)), shown(show_one(read_state(run)))
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


class Lengths(CausalLM):
    """A text in, a number out that is not written as text; prompts are files, and two words are its labels."""

    predicts = "lengths"
    generates = False
    reads_files = True

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.labels = ["short", "long"]

    def evaluate(self, *_: object) -> dict[str, float]:
        return {"loss": 0.5, **scores(self.predicts, [2.0, 4.0], [2.0, 3.0])}


def error(predictions: list[float], references: list[float]) -> float:
    return sum(abs(p - r) for p, r in zip(predictions, references, strict=True)) / len(references)


@pytest.fixture
def new_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a task that federation files know."""
    monkeypatch.setitem(TASKS, "causal-lm", Lengths)
    monkeypatch.setitem(SCORES, "error", Score("error", "Error", "mean absolute error", "lengths", error))


def federation(folder: Path) -> tuple[FederationConfig, Path]:
    file = make_federation(folder, {"site-a": 8})
    return resolved(load(file, FederationConfig), file), file


@pytest.mark.parametrize("new", [True, False])
def test_server_evaluates_a_new_task_by_its_scores_and_asks_for_text_where_it_writes_some(
    tmp_path: Path, request: pytest.FixtureRequest, new: bool
) -> None:
    if new:
        request.getfixturevalue("new_task")
    server_model = ServerModel(*federation(tmp_path))
    state = server_model.initial_state()
    found = "error" in server_model.evaluate(state), len(server_model.answers(state))
    assert found == ((True, 0) if new else (False, 2))


@pytest.mark.usefixtures("new_task")
def test_experiment_picks_by_a_new_tasks_scores_and_counts_its_labels(tmp_path: Path) -> None:
    found = plan(make_experiment(tmp_path, select_by="error"))
    (held,) = found.partitions
    assert set(held["sites"]["site-a"]) != {"rows"}  # not rows alone, but rows of every answer
    with pytest.raises(
        ConfigError, match="`select_by` is 'rouge_l'; measured by this task and evaluation: loss, error"
    ):
        plan(make_experiment(tmp_path, select_by="rouge_l", federation__evaluation__generate=3))


@pytest.mark.parametrize("new", [True, False])
def test_preflight_counts_tokens_only_where_prompts_are_no_files(
    tmp_path: Path, request: pytest.FixtureRequest, new: bool
) -> None:
    if new:
        request.getfixturevalue("new_task")
    config, file = federation(tmp_path)
    site = tmp_path / "site-a.yaml"
    subject = CheckContext(load(site, SiteConfig), site, config, file)
    assert (subject.tokens == 0) == new
    if new:
        with pytest.raises(Skip):
            shard.lengths(subject)
    else:
        assert "tokens a row" in shard.lengths(subject).found


@pytest.mark.usefixtures("new_task")
def test_partition_holds_data_against_a_new_tasks_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, file = federation(tmp_path)
    data = tmp_path / "data.jsonl"
    command = ["data", "partition", str(data), "--by", "iid", "--sites", "1", "--prompt", "name", "--answer", "size"]
    command += ["--federation", str(file), "--out", str(tmp_path / "out")]
    data.write_text('{"name": "a.txt", "size": "huge"}\n')
    assert cli.main(command) == 2
    assert "label(s) 'huge' of the data are not in `task.labels`" in capsys.readouterr().err
    data.write_text('{"name": "a.txt", "size": "long"}\n')
    assert cli.main(command) == 0
    assert load(tmp_path / "out" / "site-1.yaml", SiteConfig).data.prompt == f"{tmp_path}/{{name}}"


def test_base_model_is_loaded_as_a_new_task_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(CausalLM):
        auto_class = "AutoModel"

    monkeypatch.setitem(TASKS, "causal-lm", Bare)
    task: Task[Example] = make_task(CausalLMTask())
    assert type(task.load(str(make_model(tmp_path / "model")), None, "float32", 0).model) is LlamaModel


def test_new_family_is_selected_from_and_bounds_its_rows() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=3, max_position_embeddings=40))
    trained = freeze_all_but(model, select(model, "mlp", "lower 2"))
    assert [tuple(p.shape) for p in trained.values()] == [(48, 32), (32, 48)] * 2
    model(input_ids=torch.ones(1, 40, dtype=torch.long))
    check_length(model, 40)
    with pytest.raises(ModelError, match="this opt model has 40 positions"):
        check_length(model, 41)


def test_blocks_of_a_special_family_are_named_in_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"small": [Sequential(Linear(2, 2)) for _ in range(2)], "large": [Sequential(Linear(9, 9)) for _ in "abc"]}
    model = ModuleDict({name: ModuleList(blocks) for name, blocks in lists.items()})
    assert [path for path, _ in blocks_of(model)] == ["large.0", "large.1", "large.2"]
    monkeypatch.setitem(SPECIAL, "ModuleDict", "small")
    assert [path for path, _ in blocks_of(model)] == ["small.0", "small.1"]


@pytest.mark.parametrize("made_as", ["ElectraForMaskedLM", "ElectraForCausalLM"])
def test_preflight_asks_for_the_federation_where_a_model_does_not_write(tmp_path: Path, made_as: str) -> None:
    make_federation(tmp_path, {"site-a": 8})
    (tmp_path / "model" / "config.json").write_text(f'{{"model_type": "electra", "architectures": ["{made_as}"]}}')
    site = tmp_path / "site-a.yaml"
    subject = CheckContext(load(site, SiteConfig).model_copy(update={"model": ModelSource(path="model")}), site)
    if made_as == "ElectraForMaskedLM":
        with pytest.raises(Skip, match="needs --federation: what a electra model learns"):
            _ = subject.task
    else:
        assert isinstance(subject.task, CausalLM)
