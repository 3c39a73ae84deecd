"""Models, rows and settings of the comparison, the same for every side."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf

from client.training.trainer import _shuffled
from common.config.load import load
from common.config.site import SiteConfig
from common.config.strategy import FedFTGConfig, FedITConfig
from common.config.task import CausalLMTask
from common.config.training import TrainingConfig
from common.data.chat import Example
from common.data.rows import Row, load_rows
from common.data.tasks import CausalLM, make_task
from common.model.tuning import Tuned, tune
from deploy.demo.prepare import DEFAULT_CACHE

SEED = "training-step"
SITE = Path(__file__).parents[2] / "deploy" / "demo" / "site-a.yaml"
JOINED = 7  # rows that make a long one


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        model: "SmolLM2-135M", or "Gemma vocabulary", four random blocks under 256,000 tokens.
        method: "LoRA" or "FedFTG".
        rank: its rank.
        rows: rows per step.
        long: whether a row is of ``JOINED`` of the demo's.
    """

    model: str
    method: Literal["LoRA", "FedFTG"]
    rank: int
    rows: int = 8
    long: bool = False

    @property
    def strategy(self) -> FedITConfig | FedFTGConfig:
        """The federation's strategy section."""
        if self.method == "LoRA":
            return FedITConfig(rank=self.rank)
        return FedFTGConfig(rank=self.rank, modules="mlp", blocks="lower third")

    def training(self, steps: int) -> TrainingConfig:
        """The federation's training section."""
        # Under FedFTG nothing is clipped: galore-torch would go by whole gradients, FedSpan by projected ones.
        rate, clipped = (1e-3, 1.0) if self.method == "LoRA" else (8e-3, None)
        return TrainingConfig(
            learning_rate=rate, max_grad_norm=clipped, batch_size=self.rows, local_steps=steps, max_length=512
        )


CASES = {
    "lora": Case("SmolLM2-135M", "LoRA", 8),
    "fedftg": Case("SmolLM2-135M", "FedFTG", 16),
    "wide-lora": Case("Gemma vocabulary", "LoRA", 8),
    "wide-fedftg": Case("Gemma vocabulary", "FedFTG", 16),
    "long-lora": Case("SmolLM2-135M", "LoRA", 8, rows=2, long=True),
    "long-fedftg": Case("SmolLM2-135M", "FedFTG", 16, rows=2, long=True),
}


@dataclass(frozen=True)
class Work:
    """A case, ready to train: ``order`` are the rows in the order of the steps."""

    tokenizer: Any
    tuned: Tuned
    examples: list[Example]
    order: list[Example]


def prepare(case: Case, steps: int) -> Work:
    """Load model and rows."""
    site, task = load(SITE, SiteConfig), make_task(CausalLMTask())
    base = task.load(str(DEFAULT_CACHE / "smollm2"), None, "float32", 0)
    if case.model == "Gemma vocabulary":
        base = replace(base, model=_wide())
    rows = load_rows(site.data, SITE).rows
    if case.long:
        rows = [_joined(rows[at : at + JOINED]) for at in range(0, len(rows) - JOINED, JOINED)]
    examples = task.examples(base.tokenizer, rows, site.data.system, 512)
    numbers = _shuffled(len(examples), case.rows, SEED, carry_over=True)
    order = [examples[i] for _ in range(steps) for i in next(numbers)]
    return Work(base.tokenizer, tune(base.model, case.strategy, CausalLM.peft_type), examples, order)


def _wide() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return hf.GemmaForCausalLM(hf.GemmaConfig(vocab_size=256_000, num_key_value_heads=1, head_dim=64, **sizes))


def _joined(rows: list[Row]) -> Row:
    return Row("; ".join(row.prompt for row in rows), "; ".join(row.answer for row in rows))
