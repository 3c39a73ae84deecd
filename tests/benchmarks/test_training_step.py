"""A tiny model's losses under FedSpan's loop, packed and padded, are those under transformers' Trainer."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks.training_step.cases import SEED, Case, Work
from benchmarks.training_step.sides import Pace, ours, peer
from client.training.trainer import _shuffled
from common.data.chat import encode
from common.data.rows import Row
from common.model.tuning import tune
from deploy.sandbox.tiny import make_tokenizer

STEPS = 4
WORDS = ("acute pain", "ache of the hand", "swelling", "foot", "swelling of the foot and more", "ear")
CASE = Case("tiny", "LoRA r 8", rows=4)


class Losses(Pace):
    """Notes the losses and waits for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def pause(self, *, last: bool = False) -> None:
        del last
        self.losses.append(self.loss)


def work() -> Work:
    """Rows and a new model, the same each time."""
    tokenizer = make_tokenizer()
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    rows = [Row(a, b) for a in WORDS for b in WORDS[:2]]
    examples = [encode(tokenizer, row, "Be brief.", 64) for row in rows]
    numbers = _shuffled(len(examples), CASE.rows, SEED, carry_over=True)
    order = [examples[i] for _ in range(STEPS) for i in next(numbers)]
    return Work(tokenizer, tune(model, CASE.strategy, "CAUSAL_LM"), examples, order)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_losses_of_all_sides_are_the_same() -> None:
    found = {}
    for side, run in {"FedSpan": ours, "FedSpan, padded": ours, "Trainer": peer}.items():
        pace = Losses()
        run(CASE, work(), STEPS, pace, side)
        found[side] = pace.losses[1:]  # the first pause is before the first step
    assert len(found["Trainer"]) == STEPS
    assert found["Trainer"][-1] != found["Trainer"][0]
    for side in ("FedSpan", "FedSpan, padded"):
        assert found[side] == pytest.approx(found["Trainer"], rel=1e-5)
