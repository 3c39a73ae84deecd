"""The use of a run's states: checkpoints, the best round, early stopping, the delivery to the sites."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from common.config.section import Section
from common.config.strategy import StrategyConfig
from common.metrics import ANSWERS, LABELS, SCORES


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes after the server died."""

    every: int = Field(1, ge=1, description="Rounds between two checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept; each is as large as the federation's tensors.")


class BestConfig(Section):
    """The best round, whose model is kept beside the last one, and early stopping."""

    metric: str | None = Field(
        None,
        description="Score that decides: on the server's own set, else the sites' mean, weighted by held-out rows. "
        "null: the loss, for classification the accuracy.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="The run stops when so many evaluated rounds in a row were not better than the best one; null: it "
        "trains all rounds.",
    )
    min_change: float = Field(0.0, ge=0, description="A round is better when its score is better by more than this.")

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in SCORES:
            raise ValueError(f"{metric!r} is no score; allowed: {', '.join(SCORES)}")
        return metric


class DeliveryConfig(Section):
    """The delivery: after the last round every site that keeps the model (`keep`) writes it."""

    deadline: float = Field(
        600.0,
        ge=0,
        description="Longest that the run waits for sites that took part and are away, or lack the model yet, seconds.",
    )


class KeepConfig(Section):
    """The federation's model at the site."""

    model: str = Field(
        min_length=1,
        description="Folder for the models, relative to this file; each federation gets a folder of its name in it.",
    )
    when: Literal["end", "best", "every"] = Field(
        "end",
        description="`end`: the model of the last round, in `model`. `best`: that of the best round, in `best`. "
        "`every`: that of each round, in `round-NNN`.",
    )


def checkpoints_needed(checkpoint: CheckpointConfig, strategy: StrategyConfig) -> Iterator[str]:
    """The contradictions between rare checkpoints and what sites keep for themselves, one sentence each.

    A resumed run repeats the rounds since its checkpoint, and a site keeps its own tensors of the last two rounds
    (decision 009).
    """
    if checkpoint.every == 1:
        return
    told = f"`checkpoint.every` is {checkpoint.every}, and sites can go back by one round with what they keep:"
    if strategy.optimizer_state == "keep":
        yield f"{told} `strategy.optimizer_state` keep needs 1"
    if strategy.stays_at_site is not None:
        yield f"{told} `strategy` {strategy.name}, which keeps every {strategy.stays_at_site} there, needs 1"
    if strategy.head == "local":
        yield f"{told} `strategy.head` local needs 1"


def measured(best: BestConfig, *, classifies: bool, generates: bool) -> list[str]:
    """The scores that an evaluation measures and that may decide about the best round, by name; the default first.

    Args:
        best: the section.
        classifies: whether the task has labels.
        generates: whether evaluations generate answers.

    Raises:
        ValueError: the section names a score that is not among them.
    """
    default = "accuracy" if classifies else "loss"
    kinds = {None, LABELS if classifies else ANSWERS if generates else None}
    names = [score.name for score in SCORES.values() if score.selectable and score.of in kinds]
    if best.metric is not None and best.metric not in names:
        raise ValueError(f"`best.metric` is {best.metric}, which no evaluation measures; allowed: {', '.join(names)}")
    return sorted(names, key=lambda name: name != default)
