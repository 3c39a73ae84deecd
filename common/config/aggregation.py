"""The sections of a federation file for the server's aggregation and the server optimizer."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.section import Section


class _Clipping(Section):
    """Aggregation methods that can clip updates first."""

    clip_norm: float | None = Field(
        None,
        gt=0,
        description="Updates with a larger norm than this many times the round's median norm are clipped to it; null: "
        "no clipping.",
    )


class MeanConfig(_Clipping):
    """The mean, weighted by examples unless ``weights`` says otherwise."""

    method: Literal["mean"] = "mean"
    weights: Literal["rows", "uniform"] = Field(
        "rows", description="`rows`: a site counts by its training rows. `uniform`: all sites count alike."
    )


class TrimmedMeanConfig(_Clipping):
    """Coordinate-wise trimmed mean (arXiv 1803.01498), unweighted."""

    method: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(gt=0, lt=0.5, description="Share of the updates left out at either end, rounded down.")


class MedianConfig(_Clipping):
    """Coordinate-wise median (arXiv 1803.01498), unweighted."""

    method: Literal["median"] = "median"


class _KrumConfig(Section):
    """Keys of both Krum and multi-Krum."""

    byzantine: int = Field(
        ge=0,
        description="f: number of sites that may send arbitrary updates. Krum needs 2 f + 3 updates in a round, so "
        "`cohort.min_clients` must be at least 2 f + 3.",
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
    learning_rate: float = Field(
        1.0, gt=0, description="Server's learning rate; 1 without momentum is plain averaging."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Share of the last round's momentum that is kept.")


class FedAdamConfig(Section):
    """Adam over the rounds' averaged changes (arXiv 2003.00295, algorithm 2)."""

    method: Literal["fedadam"] = "fedadam"
    learning_rate: float = Field(
        gt=0, description="Server's learning rate: about the largest change of a coordinate in a round."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of the changes.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the mean of the squared changes.")
    tau: float = Field(1e-3, gt=0, description="Adaptivity: changes much smaller than this are not scaled up.")


ServerOptimizerConfig = Annotated[FedAvgMConfig | FedAdamConfig, Field(discriminator="method")]
