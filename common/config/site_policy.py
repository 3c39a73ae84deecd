"""The sections of a site file that limit what leaves the site: its policy, and differential privacy.

They concern the site alone. The server never sees them; it is told what noise to expect and why a request is refused.
"""

from typing import Annotated

from pydantic import ConfigDict, Field, field_validator

from common.config.section import Section
from common.config.strategy import names

_Names = Annotated[list[str], Field(min_length=1)]


class PolicyConfig(Section):
    """What the site takes part in, and what may leave it. A key that is left out limits nothing."""

    model_config = ConfigDict(allow_inf_nan=False)

    federations: _Names | None = Field(None, description="Names of the federations that the site takes part in.")
    strategies: _Names | None = Field(None, description="Strategies under which it trains.")
    tensors: _Names | None = Field(
        None,
        description="Patterns of the tensors that may be trained and sent, e.g. model.layers.*.mlp.*; `*` stands for "
        "anything. For LoRA too, whose names begin with base_model.model. before the model's own.",
    )
    max_rounds: int | None = Field(
        None,
        ge=1,
        description="Updates that it sends to one federation, in all runs; one asked for again counts again.",
    )
    max_rounds_per_day: int | None = Field(None, ge=1, description="Updates that it sends in a day (UTC), in total.")
    max_upload_bytes_per_day: int | None = Field(None, ge=1, description="Bytes of tensors that leave in a day (UTC).")
    min_examples: int | None = Field(None, ge=1, description="Fewest training rows with which it takes part.")
    max_update_norm: float | None = Field(
        None, gt=0, description="L2 norm of an update, over all its tensors, above which it is not sent."
    )
    share_metrics: bool | None = Field(
        None, description="Whether losses and held-out scores leave; null: yes, but not with `privacy`."
    )

    @field_validator("strategies")
    @classmethod
    def _known(cls, strategies: list[str] | None) -> list[str] | None:
        for name in strategies or []:
            if name not in names():
                raise ValueError(f"{name!r} is no strategy; allowed: {', '.join(names())}")
        return strategies


class PrivacyConfig(Section):
    """Local differential privacy of the whole shard: every update is clipped and noised before it leaves."""

    model_config = ConfigDict(allow_inf_nan=False)

    clip: float = Field(gt=0, description="L2 norm of an update, over all its tensors, to which longer ones are cut.")
    noise_multiplier: float = Field(
        gt=0, description="Standard deviation of the noise on every number that leaves, in units of `clip`."
    )
    delta: float = Field(gt=0, le=1e-3, description="Delta of the guarantee.")
    max_epsilon: float = Field(gt=0, description="Budget: the site stops before a round that would exceed it.")


def check_site(policy: PolicyConfig, privacy: PrivacyConfig | None, precision: str) -> None:
    """Raise a ValueError when parts of a site file contradict each other."""
    if privacy is None:
        return
    if precision == "float16":
        raise ValueError(
            "`precision` float16 leaves out steps whose gradients overflow, so that the decay of the weights, which "
            "leaves without noise, tells of the rows; allowed with `privacy`: auto, float32, bfloat16"
        )
    if policy.share_metrics:
        raise ValueError(
            "`policy.share_metrics` is true, but losses and scores carry no noise; allowed with `privacy`: false"
        )
    if policy.max_update_norm is not None:
        raise ValueError(
            "`policy.max_update_norm` would tell by a refusal how long an update is; with `privacy` leave it out, "
            "`privacy.clip` limits every update"
        )
    private = names(lambda section: section.private)
    for name in policy.strategies or []:
        if name not in private:
            raise ValueError(
                f"`policy.strategies` has {name}, which sends more than an update; allowed with `privacy`: "
                f"{', '.join(private)}"
            )
