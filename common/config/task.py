"""The section of a federation file that chooses the learning task."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from common.config.section import Section


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
