"""The section of a federation file that chooses the learning task, and which keys of other sections fit a task."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from common.config.section import Section
from common.config.strategy import StrategyConfig
from common.config.training import TrainingConfig


class CausalLMTask(Section):
    """Prompt in, answer out."""

    type: Literal["causal-lm"] = "causal-lm"


class ClassificationTask(Section):
    """Keys of all classification tasks. Where the base model has no head for ``labels``, a new head is drawn."""

    labels: list[str] = Field(min_length=2, description="All labels, the same at every site, in a fixed order.")

    @field_validator("labels")
    @classmethod
    def _unique(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError("`labels` has the same label twice")
        return labels


class SequenceClassificationTask(ClassificationTask):
    """A text in, a label out."""

    type: Literal["sequence-classification"] = "sequence-classification"


class ImageClassificationTask(ClassificationTask):
    """An image in, a label out."""

    type: Literal["image-classification"] = "image-classification"


TaskConfig = Annotated[CausalLMTask | SequenceClassificationTask | ImageClassificationTask, Field(discriminator="type")]


def task_fits(task: TaskConfig, strategy: StrategyConfig, training: TrainingConfig) -> Iterator[str]:
    """The contradictions between the task and the other sections, one sentence each."""
    classifies, head, rate = isinstance(task, ClassificationTask), strategy.head, training.head_learning_rate
    if classifies and head is None:
        yield "missing key `strategy.head`: how the classifier's head is treated; allowed: train, freeze or local"
    if head is not None and not classifies:
        yield f"`strategy.head` is {head!r}, but `task` {task.type} has no classification head"
    if rate is not None and not classifies:
        yield f"`training.head_learning_rate` is {rate:g}, but `task` {task.type} has no classification head"
    if rate is not None and head == "freeze":
        yield (
            f"`training.head_learning_rate` is {rate:g}, but `strategy.head` freeze trains no head; allowed with it: "
            "train, local"
        )
    if training.packing == "on" and classifies:
        yield f"`training.packing` is on, but `task` {task.type} packs no rows; allowed with it: auto, off"
