"""The section of a federation file for local training at every site."""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config.section import Section

PackingMode = Literal["auto", "off", "on"]


class TrainingConfig(Section):
    """Local training. Give ``local_steps`` or ``local_epochs``."""

    #: Adam's betas, the same at all clients. No key sets them: admission derives the largest possible step from them.
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="Local optimizer; under FedFTG it runs inside the projection."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of a classification head that is trained (`strategy.head` train or local); "
        "null: `learning_rate`.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Schedule of the learning rate over all rounds of the run."
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the whole run spent in linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Largest L2 norm of a gradient; larger gradients are clipped. null: no clipping."
    )
    batch_size: int = Field(8, ge=1, description="Rows in one forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    local_steps: int | None = Field(None, ge=1, description="Optimizer steps per round.")
    local_epochs: int | None = Field(None, ge=1, description="Passes over the shard per round.")
    max_length: int = Field(512, ge=8, description="Most tokens per row; longer rows are truncated.")
    packing: PackingMode = Field(
        "auto",
        description="Lay short rows of a forward pass into fewer, longer ones, apart from each other: less work, the "
        "same loss. auto: where the model can. on: a model that cannot is refused; with the task `causal-lm` alone.",
    )
    gradient_checkpointing: bool = Field(False, description="Saves memory and takes more time.")
    seed: int = Field(0, ge=0, le=10**18, description="Seed of batch order, LoRA initialisation and sampling.")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of `local_steps` and `local_epochs`")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    def rate(self, name: str) -> float:
        """The peak learning rate of a tensor, by its name in messages."""
        from common.model.families import in_head

        if self.head_learning_rate is None or not in_head(name):
            return self.learning_rate
        return self.head_learning_rate

    def steps(self, rows: int) -> int:
        """Optimizer steps per round at a client with ``rows`` training rows."""
        return self.local_steps or math.ceil(rows / self.rows_per_step) * (self.local_epochs or 1)

    def rows_touched(self, rows: int) -> int:
        """Distinct rows that a round trains on, at a client that has so many."""
        return rows if self.local_steps is None else min(rows, self.local_steps * self.rows_per_step)
