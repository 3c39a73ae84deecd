"""A tiny model's losses under FedSpan's loop, packed and padded, are those under transformers' Trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks import table
from benchmarks.table import Cell
from benchmarks.training_step import run
from benchmarks.training_step.cases import SEED, Case, Work
from benchmarks.training_step.sides import Pace, ours, peer
from client.training.trainer import _shuffled
from common.data.chat import encode
from common.data.rows import Row
from common.model.tuning import tune
from deploy.sandbox.tiny import make_tokenizer

STEPS = 4
WORDS = ("acute pain", "ache of the hand", "swelling", "foot", "swelling of the foot and more", "ear")
CASES = (Case("tiny", "LoRA", 8, rows=4), Case("tiny", "FedFTG", 2, rows=4))


class Losses(Pace):
    """Notes the losses and waits for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def pause(self, *, last: bool = False) -> None:
        del last
        self.losses.append(self.loss)


def work(case: Case) -> Work:
    """Rows and a new model, the same each time."""
    tokenizer = make_tokenizer()
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    rows = [Row(a, b) for a in WORDS for b in WORDS[:2]]
    examples = [encode(tokenizer, row, "Be brief.", 64) for row in rows]
    numbers = _shuffled(len(examples), case.rows, SEED, carry_over=True)
    order = [examples[i] for _ in range(STEPS) for i in next(numbers)]
    return Work(tokenizer, tune(model, case.strategy, "CAUSAL_LM"), examples, order)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_losses_of_all_sides_are_the_same(case: Case) -> None:
    found = {}
    for side, train in {"FedSpan": ours, "FedSpan, padded": ours, "Trainer": peer}.items():
        pace = Losses()
        train(case, work(case), STEPS, pace, side)
        found[side] = pace.losses[1:]  # the first pause is before the first step
    assert len(found["Trainer"]) == STEPS
    assert found["Trainer"][-1] != found["Trainer"][0]
    for side in ("FedSpan", "FedSpan, padded"):
        assert found[side] == pytest.approx(found["Trainer"], rel=1e-5)


def test_a_case_measured_later_keeps_the_rows_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(name: str, *_: Any) -> list[dict[str, Cell]]:
        asked.append(name)
        return [{"case": name, "time": len(asked)}]

    for module in (table, run):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "prepare", lambda _: True)
    monkeypatch.setattr(run, "measure", measure)

    def call(*cases: str) -> dict[str, Cell]:
        asked.clear()
        monkeypatch.setattr("sys.argv", ["run", *cases])
        run.main()
        written = json.loads((tmp_path / "training-step.json").read_text())
        return {row["case"]: row["time"] for row in written["rows"]}

    assert call("long-lora", "fedftg") == {"fedftg": 2, "long-lora": 1}
    assert call("lora") == {"lora": 1, "fedftg": 2, "long-lora": 1}
    missing = [name for name in run.CASES if name not in ("lora", "fedftg", "long-lora")]
    assert call().keys() == run.CASES.keys()
    assert asked == missing
    there = json.loads((tmp_path / "training-step.json").read_text())
    (tmp_path / "training-step.json").write_text(json.dumps({**there, "machine": {"cpu": "another"}}))
    assert call("lora") == {"lora": 1}
