"""The sections of a federation file that say how the server combines updates, and how it goes on with the result."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.section import Section


class _Clipping(Section):
    """Ways to combine updates that may be clipped first."""

    clip_norm: float | None = Field(
        None, gt=0, description="Longest change of a site, in medians of the round's norms; null: not clipped."
    )


class MeanConfig(_Clipping):
    """The mean, weighted by examples."""

    method: Literal["mean"] = "mean"


class TrimmedMeanConfig(_Clipping):
    """Coordinate-wise trimmed mean (arXiv 1803.01498), unweighted."""

    method: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(gt=0, lt=0.5, description="Share of the updates left out at either end, rounded down.")


class MedianConfig(_Clipping):
    """Coordinate-wise median (arXiv 1803.01498), unweighted."""

    method: Literal["median"] = "median"


class _KrumConfig(Section):
    """What Krum and multi-Krum share."""

    byzantine: int = Field(
        ge=0,
        description="f: how many sites may send anything; a round needs 2 f + 3 updates, `cohort.min_clients` too.",
    )


class KrumConfig(_KrumConfig):
    """The one update nearest to its neighbors (arXiv 1703.02757)."""

    method: Literal["krum"] = "krum"


class MultiKrumConfig(_KrumConfig):
    """The mean, weighted by examples, of all but the f updates farthest from their neighbors (arXiv 1703.02757)."""

    method: Literal["multi-krum"] = "multi-krum"


AggregationConfig = Annotated[
    MeanConfig | TrimmedMeanConfig | MedianConfig | KrumConfig | MultiKrumConfig, Field(discriminator="method")
]


class FedAvgMConfig(Section):
    """Momentum over the rounds' averaged changes (arXiv 1909.06335)."""

    method: Literal["fedavgm"] = "fedavgm"
    learning_rate: float = Field(1.0, gt=0, description="Of the server; 1 without momentum is plain averaging.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Share of the last rounds' step that is kept.")


class FedAdamConfig(Section):
    """Adam over the rounds' averaged changes (arXiv 2003.00295, algorithm 2)."""

    method: Literal["fedadam"] = "fedadam"
    learning_rate: float = Field(gt=0, description="Of the server: about how far a coordinate moves in a round.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of the changes.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the mean of their squares.")
    tau: float = Field(1e-3, gt=0, description="Adaptivity: changes much smaller than this are not scaled up.")


ServerOptimizerConfig = Annotated[FedAvgMConfig | FedAdamConfig, Field(discriminator="method")]
