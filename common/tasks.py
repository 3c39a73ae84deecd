"""What is learned: how a row becomes an example, what the loss is, what is measured. One class per task."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import chat
from common.base_model import Base, load_base
from common.config import ClassificationTask, Dtype, EvaluationConfig, TaskConfig
from common.errors import DataError
from common.evaluation import evaluate_model, in_fixed_order
from common.memory import halving
from common.rows import Row

Batch = dict[str, Tensor]
E = TypeVar("E")


@dataclass(frozen=True)
class Place:
    """Where and how a model is evaluated: device, and the arithmetic there (None: the weights' own)."""

    device: torch.device
    autocast: torch.dtype | None = None


class Task(ABC, Generic[E]):
    """A task; ``E`` is its example type."""

    peft_type: ClassVar[str]

    @abstractmethod
    def load(self, source: str, revision: str | None, dtype: Dtype, seed: int) -> Base:
        """The base model for this task; ``seed`` decides what the base model does not hold (a new head)."""

    @abstractmethod
    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[E]:  # noqa: ANN401
        """Rows as examples of at most ``max_length`` tokens.

        Raises:
            DataError: a row's answer is not one the task knows.
        """

    @abstractmethod
    def collater(self, tokenizer: Any) -> Callable[[list[E]], Batch]:  # noqa: ANN401
        """What makes a batch of examples: input_ids, attention_mask, labels (-100: not counted)."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Summed loss of a batch, and of how many labels."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        rows: list[Row],
        config: EvaluationConfig,
        system: str | None,
        max_length: int,
        place: Place,
    ) -> dict[str, float]:
        """Metrics of a model on held-out rows."""


class CausalLM(Task[chat.Example]):
    """Prompt in, answer out; the loss counts the answer's tokens."""

    peft_type = "CAUSAL_LM"

    def load(self, source: str, revision: str | None, dtype: Dtype, seed: int) -> Base:
        """See ``Task.load``."""
        del seed  # a causal language model is complete
        return load_base(source, revision, dtype)

    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[chat.Example]:  # noqa: ANN401
        """See ``Task.examples``."""
        return [chat.encode(tokenizer, row, system, max_length) for row in rows]

    def collater(self, tokenizer: Any) -> Callable[[list[chat.Example]], Batch]:  # noqa: ANN401
        """See ``Task.collater``."""
        padding = chat.pad_id(tokenizer)
        return lambda examples: chat.collate(examples, padding)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See ``Task.loss_sum``."""
        return chat.causal_loss_sum(model, batch)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        rows: list[Row],
        config: EvaluationConfig,
        system: str | None,
        max_length: int,
        place: Place,
    ) -> dict[str, float]:
        """See ``Task.evaluate``: loss, perplexity, and scores of generated answers."""
        return evaluate_model(
            model,
            tokenizer,
            rows,
            config,
            system=system,
            max_length=max_length,
            device=place.device,
            autocast_dtype=place.autocast,
        )


@dataclass(frozen=True, repr=False)
class Labelled:
    """A text as tokens, and its class."""

    input_ids: list[int]
    label: int


class SequenceClassification(Task[Labelled]):
    """A text in (the row's prompt), one of a fixed set of labels out (the row's answer)."""

    peft_type = "SEQ_CLS"

    def __init__(self, labels: list[str]) -> None:
        self._labels = {label: number for number, label in enumerate(labels)}

    def load(self, source: str, revision: str | None, dtype: Dtype, seed: int) -> Base:
        """See ``Task.load``: the head is new, drawn from ``seed``, so that it is the same everywhere."""
        return load_base(source, revision, dtype, labels=list(self._labels), seed=seed)

    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[Labelled]:  # noqa: ANN401
        """See ``Task.examples``."""
        del system  # a classifier has no chat
        unknown = sum(row.answer not in self._labels for row in rows)
        if unknown:
            raise DataError(
                f"{unknown} of {len(rows)} rows have a label that is not in task.labels: {list(self._labels)}"
            )
        ids = tokenizer([row.prompt for row in rows], truncation=True, max_length=max_length)["input_ids"]
        return [Labelled(list(i), self._labels[row.answer]) for i, row in zip(ids, rows, strict=True)]

    def collater(self, tokenizer: Any) -> Callable[[list[Labelled]], Batch]:  # noqa: ANN401
        """See ``Task.collater``."""
        padding = chat.pad_id(tokenizer)

        def collate(examples: list[Labelled]) -> Batch:
            batch = chat.collate([chat.Example(e.input_ids, len(e.input_ids)) for e in examples], padding)
            return {**batch, "labels": torch.tensor([e.label for e in examples])}

        return collate

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See ``Task.loss_sum``."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return functional.cross_entropy(logits.float(), batch["labels"], reduction="sum"), len(logits)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        rows: list[Row],
        config: EvaluationConfig,
        system: str | None,
        max_length: int,
        place: Place,
    ) -> dict[str, float]:
        """See ``Task.evaluate``: loss, perplexity (of the label) and accuracy."""
        model.train(False)
        examples = self.examples(tokenizer, in_fixed_order(rows)[: config.max_examples], system, max_length)
        collate = self.collater(tokenizer)
        total, right = 0.0, 0

        def measure(some: list[Labelled]) -> tuple[float, int]:
            batch = {k: v.to(place.device) for k, v in collate(some).items()}
            with torch.autocast(place.device.type, dtype=place.autocast, enabled=place.autocast is not None):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            loss = float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            return loss, int((logits.argmax(-1) == batch["labels"]).sum())

        for loss, hits in halving(examples, config.batch_size, measure):
            total, right = total + loss, right + hits
        count = len(examples)
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(loss), "examples": float(count), "accuracy": right / count}


def make_task(config: TaskConfig) -> Task[Any]:
    """The task that a federation file names."""
    return SequenceClassification(config.labels) if isinstance(config, ClassificationTask) else CausalLM()
