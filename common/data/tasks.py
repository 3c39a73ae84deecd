"""Learning tasks: how a row becomes an example, the loss, the metrics. One class per task (decision 019)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from common.config.federation import Dtype, EvaluationConfig
from common.config.section import DataConfig, resolve
from common.config.task import ClassificationTask, TaskConfig
from common.data import chat
from common.data.evaluation import EvalSettings, evaluate_model, in_fixed_order
from common.data.images import load_images, read_image
from common.data.packing import Packing
from common.data.rows import Loaded, Row, load_rows
from common.errors import DataError
from common.metrics import ANSWERS, LABELS, SCORES, Score, confusion, scores
from common.model.base_model import Base, load_base, pad_id
from common.model.quantization import WHOLE, Held
from common.system.machine import halving

Batch = dict[str, Tensor]
E = TypeVar("E")


class Task(ABC, Generic[E]):
    """A task; ``E`` is its example type.

    Attributes:
        auto_class: name of the transformers class that loads the task's models.
        processor: name of the transformers class that makes the models' inputs.
        peft_type: PEFT's name of the task; None where PEFT has none.
        predicts: kind of the predictions, as in ``common.metrics``.
        generates: whether scores need generated text, which takes long: then only ``evaluation.generate`` rows count.
        packs: whether rows of a forward pass may be packed (``common.data.packing``).
        reads_files: whether a row's prompt is a file that is read for every batch; then an example holds no tokens.
        labels: all labels in order; empty for tasks without labels.
    """

    auto_class: ClassVar[str]
    processor: ClassVar[str] = "AutoTokenizer"
    peft_type: ClassVar[str | None] = None
    predicts: ClassVar[str]
    generates: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    reads_files: ClassVar[bool] = False

    def __init__(self, config: TaskConfig) -> None:
        self.labels = config.labels if isinstance(config, ClassificationTask) else []

    def scores(self, config: EvaluationConfig) -> list[Score]:
        """The scores among the metrics that ``evaluate`` gives."""
        predicted = config.generate > 0 or not self.generates
        return [s for s in SCORES.values() if s.of is None or (predicted and s.of == self.predicts)]

    def load(self, source: str, revision: str | None, dtype: Dtype, seed: int, held: Held = WHOLE) -> Base:
        """Load the base model for this task; missing weights (a new head) are drawn from ``seed``, the same everywhere.

        Raises:
            ModelError: see ``load_base``.
        """
        how = {"auto_class": self.auto_class, "processor": self.processor}
        return load_base(source, revision, dtype, **how, labels=self.labels, seed=seed, held=held)

    def rows(self, config: DataConfig, beside: Path) -> Loaded:
        """All usable rows of a shard.

        Raises:
            DataError: see ``load_rows``.
        """
        if config.skip_unreadable:
            raise DataError("data.skip_unreadable is true; it is for images, and the federation's task has none")
        if config.messages is not None and not self.generates:
            raise DataError("data.messages is for conversations, and the federation's task has none; give data.prompt")
        return load_rows(config, beside)

    @abstractmethod
    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[E]:  # noqa: ANN401
        """Rows as examples of at most ``max_length`` tokens.

        Raises:
            DataError: a row's answer is not among the task's labels.
        """

    @abstractmethod
    def collater(self, tokenizer: Any, packing: Packing | None = None) -> Callable[[list[E]], Batch]:  # noqa: ANN401
        """A function that makes a batch of examples: the model's inputs, and the labels that the loss counts."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Summed loss of a batch, and the number of labels in the sum."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        rows: list[Row],
        settings: EvalSettings,
    ) -> dict[str, float]:
        """Metrics of a model on held-out rows."""


class CausalLM(Task[chat.Example]):
    """Prompt in, answer out; the loss counts the answer's tokens."""

    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    predicts = ANSWERS
    generates = True
    packs = True

    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[chat.Example]:  # noqa: ANN401
        """See ``Task.examples``."""
        return [chat.encode(tokenizer, row, system, max_length) for row in rows]

    def collater(self, tokenizer: Any, packing: Packing | None = None) -> Callable[[list[chat.Example]], Batch]:  # noqa: ANN401
        """See ``Task.collater``."""
        padding = pad_id(tokenizer)
        return lambda examples: chat.collate(examples, padding, packing)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See ``Task.loss_sum``."""
        return chat.causal_loss_sum(model, batch)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        rows: list[Row],
        settings: EvalSettings,
    ) -> dict[str, float]:
        """See ``Task.evaluate``: loss, perplexity, and scores of generated answers."""
        return evaluate_model(model, tokenizer, rows, settings)


class Classification(Task[E]):
    """Tasks that predict one of a fixed set of labels (the row's answer)."""

    predicts = LABELS

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self._number = {label: number for number, label in enumerate(self.labels)}

    def rows(self, config: DataConfig, beside: Path) -> Loaded:
        """See ``Task.rows``; every row has a label that the task knows."""
        loaded = self._unlabelled(config, beside)
        try:
            self._numbers(loaded.rows)
        except DataError as error:
            raise DataError(f"shard {resolve(config.path, beside)}: {error}") from None
        return loaded

    def _unlabelled(self, config: DataConfig, beside: Path) -> Loaded:
        return super().rows(config, beside)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See ``Task.loss_sum``."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return chat.summed_loss(logits, batch["labels"]), len(logits)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        rows: list[Row],
        settings: EvalSettings,
    ) -> dict[str, float]:
        """See ``Task.evaluate``: loss, perplexity (of the label), scores of labels, and their confusion matrix."""
        model.train(False)
        chosen, device = in_fixed_order(rows)[: settings.config.max_examples], settings.device
        examples = self.examples(tokenizer, chosen, settings.system, settings.max_length)
        collate = self.collater(tokenizer)
        total, predicted, labels = 0.0, list[int](), list[int]()

        def measure(some: list[E]) -> tuple[float, list[int], list[int]]:
            batch = {key: value.to(device) for key, value in collate(some).items()}
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with torch.autocast(device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
                logits = model(**inputs).logits.float()
            loss = float(chat.summed_loss(logits, batch["labels"]))
            return loss, logits.argmax(-1).tolist(), batch["labels"].tolist()

        for loss, found, right in halving(examples, settings.config.batch_size, measure):
            total, predicted, labels = total + loss, predicted + found, labels + right
        loss = total / len(examples)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "examples": float(len(examples)),
            **scores(self.predicts, predicted, labels),
            **confusion(predicted, labels, len(self.labels)),
        }

    def _numbers(self, rows: list[Row]) -> list[int]:
        """The rows' labels as numbers."""
        unknown = [number for number, row in enumerate(rows, start=1) if row.answer not in self._number]
        if unknown:
            some = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise DataError(
                f"{len(unknown)} of {len(rows)} rows (numbers {some}) have a label that is not in task.labels: "
                f"{self.labels}"
            )
        return [self._number[row.answer] for row in rows]


@dataclass(frozen=True, repr=False)
class LabelledText:
    """A text as tokens, and its class."""

    input_ids: list[int]
    label: int


class SequenceClassification(Classification[LabelledText]):
    """A text in (the row's prompt), a label out."""

    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[LabelledText]:  # noqa: ANN401
        """See ``Task.examples``."""
        del system  # a classifier has no chat
        labels = self._numbers(rows)
        ids = tokenizer([row.prompt for row in rows], truncation=True, max_length=max_length)["input_ids"]
        return [LabelledText(list(i), label) for i, label in zip(ids, labels, strict=True)]

    def collater(self, tokenizer: Any, packing: Packing | None = None) -> Callable[[list[LabelledText]], Batch]:  # noqa: ANN401
        """See ``Task.collater``."""
        del packing
        padding = pad_id(tokenizer)

        def collate(examples: list[LabelledText]) -> Batch:
            batch = chat.padded([example.input_ids for example in examples], padding)
            return {**batch, "labels": torch.tensor([example.label for example in examples])}

        return collate


@dataclass(frozen=True, repr=False)
class LabelledImage:
    """An image's file, and its class."""

    file: str
    label: int


class ImageClassification(Classification[LabelledImage]):
    """An image in (the row's prompt is its file), a label out. Pixels are read anew for every batch."""

    auto_class = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    reads_files = True

    def _unlabelled(self, config: DataConfig, beside: Path) -> Loaded:
        return load_images(config, beside)

    def examples(self, tokenizer: Any, rows: list[Row], system: str | None, max_length: int) -> list[LabelledImage]:  # noqa: ANN401
        """See ``Task.examples``."""
        del tokenizer, system, max_length
        return [LabelledImage(row.prompt, label) for row, label in zip(rows, self._numbers(rows), strict=True)]

    def collater(self, tokenizer: Any, packing: Packing | None = None) -> Callable[[list[LabelledImage]], Batch]:  # noqa: ANN401
        """See ``Task.collater``; ``tokenizer`` is the model's image processor."""
        del packing

        def collate(examples: list[LabelledImage]) -> Batch:
            inputs = tokenizer(
                [read_image(e.file) for e in examples], return_tensors="pt"
            )  # some processors return masks, too
            return {**inputs, "labels": torch.tensor([e.label for e in examples])}

        return collate


#: Tasks by the `type` in a federation file; the sections are in ``common.config.task``.
TASKS: dict[str, type[Task[Any]]] = {
    "causal-lm": CausalLM,
    "sequence-classification": SequenceClassification,
    "image-classification": ImageClassification,
}


def make_task(config: TaskConfig) -> Task[Any]:
    """Make the task that a federation file names."""
    return TASKS[config.type](config)
