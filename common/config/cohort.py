"""The sections of a federation file for a round's sites: how many, what they may send, whether one is seen alone."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from common.config.aggregation import AggregationConfig, MeanConfig
from common.config.section import Section
from common.config.strategy import StrategyConfig
from common.config.training import TrainingConfig


class CohortConfig(Section):
    """Clients of a round, and the time limits of a round."""

    mode: Literal["rounds", "buffered"] = Field(
        "rounds",
        description="`rounds`: a round waits for its sites. `buffered` (FedBuff, arXiv 2106.06639): every connected "
        "site trains all the time; a round is over when the first `size` updates are in, and slow sites go on with the "
        "state that they have.",
    )
    size: int | None = Field(
        None, ge=1, description="Updates of a round, with `mode` buffered; from `min_clients` to the number of sites."
    )
    max_age: int | None = Field(
        None,
        ge=0,
        description="With `mode` buffered: an update is dropped when more rounds than this were finished since its "
        "site started. The change in an update of age a counts 1 / sqrt(1 + a).",
    )
    min_clients: int = Field(2, ge=1, description="A round needs this many valid updates.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the connected clients sampled each round.")
    join_deadline: float = Field(300.0, gt=0, description="Seconds to wait for `min_clients` to connect.")
    round_deadline: float = Field(3600.0, gt=0, description="Seconds a round may take.")
    deadline_factor: float | None = Field(
        None,
        gt=1,
        description="A round that has `min_clients` updates closes early: after this many times the seconds of the "
        "slowest site in the last 5 rounds, at least 10 seconds. null: the round waits for all sites until "
        "`round_deadline`.",
    )

    @property
    def buffered(self) -> bool:
        """Whether slow sites go on while the others begin the next round."""
        return self.mode == "buffered"


class AdmissionConfig(Section):
    """Limits for updates and sites, beside the checks of form and of the largest possible change."""

    norm_ratio: float | None = Field(
        10.0,
        gt=1,
        description="An update whose norm is larger than this many times the round's median norm is rejected, if the "
        "round has three updates or more. null: no such bound; updates are aggregated in arrival order without being "
        "buffered on disk.",
    )
    max_noise: float = Field(
        0.0,
        ge=0,
        description="Largest noise that a site may add for differential privacy, standard deviation per number; the "
        "bounds on the site's update grow by the declared noise. 0: a site that adds noise is not admitted.",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="Most training rows that a site may declare; the rows are the site's weight in the average. A "
        "site that declares more is not admitted. null: no limit.",
    )
    max_refusals: int = Field(
        3,
        ge=1,
        description="A site is quarantined until `fedspan readmit` when its updates are rejected, or it answers with "
        "errors, so many times in a row.",
    )
    rows_ratio: float | None = Field(
        10.0,
        ge=1,
        description="A site's weight in the average is at most this many times the rows of the round's median site, "
        "whatever number of rows the site declares. null: the weight is the number of rows that it declares.",
    )


class SecureAggregationConfig(Section):
    """Masked sums: the server learns the sum of a round's updates, and no single one (Bonawitz et al., CCS 2017)."""

    threshold: int = Field(
        ge=2,
        description="T: so many sites of a round must be left at its end for the sum to be unmasked, and so many would "
        "have to give away their keys for a single update to be seen. More than half of a round's sites: a round takes "
        "at most 2 T - 1.",
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the noise that every site adds to each number of its part of the sum; sites "
        "whose `privacy.noise` is shared ask for it. 0: none.",
    )
    tries: int = Field(
        3, ge=1, description="A round that has too few sites left is begun anew, with fresh keys, up to so many times."
    )
    exchange_deadline: float = Field(
        60.0,
        gt=0,
        description="Seconds for each of the four short exchanges around training: keys, shares of secrets, signatures "
        "of the list of survivors, unmasking.",
    )


def waiting_needed(
    cohort: CohortConfig, strategy: StrategyConfig, secure: SecureAggregationConfig | None
) -> Iterator[str]:
    """The contradictions between ``cohort.mode`` and the other keys and sections, one sentence each."""
    if not cohort.buffered:
        for key in ("size", "max_age"):
            if getattr(cohort, key) is not None:
                yield f"`cohort.{key}` is {getattr(cohort, key)}, with `cohort.mode` rounds; allowed with it: buffered"
        return
    where = "`cohort.mode` buffered"
    if cohort.size is None or cohort.max_age is None:
        yield f"{where} needs `cohort.size` and `cohort.max_age`"
    elif cohort.size < cohort.min_clients:
        least = cohort.min_clients
        yield f"`cohort.size` is {cohort.size}, with `cohort.min_clients` {least}; allowed: that many and more"
    if (reason := strategy.current_needed()) is not None:
        yield f"{where} adds changes to a later state than they started from, and `strategy` {strategy.name} {reason}"
    if secure is not None:
        yield f"{where} takes each update when it comes, and `secure_aggregation` shows the sum of a round alone"
    if cohort.fraction != 1.0:
        yield f"{where} lets every connected site train; `cohort.fraction` is {cohort.fraction:g}; allowed with it: 1"
    if cohort.deadline_factor is not None:
        factor = cohort.deadline_factor
        yield f"{where} waits for no slow site; `cohort.deadline_factor` is {factor:g}; allowed with it: null"


def single_updates_needed(
    secure: SecureAggregationConfig,
    strategy: StrategyConfig,
    training: TrainingConfig,
    aggregation: AggregationConfig,
    admission: AdmissionConfig,
    cohort: CohortConfig,
) -> Iterator[str]:
    """The contradictions between masked sums and the other sections, one sentence each."""
    where, threshold, clients = "`secure_aggregation`", secure.threshold, cohort.min_clients
    if (reason := strategy.single_updates_needed()) is not None:
        yield f"{where} shows the server nothing but a sum, and `strategy` {strategy.name} {reason}"
    if isinstance(aggregation, MeanConfig) and aggregation.weights != "rows":
        yield f"{where} weights a site by its rows; allowed with it: `aggregation` mean with `weights` rows"
    elif aggregation != MeanConfig():
        yield (
            f"{where} shows the server no single update, which `aggregation` {aggregation.method}"
            f"{' with `clip_norm`' if isinstance(aggregation, MeanConfig) else ''} needs; allowed with it: mean "
            "without `clip_norm`"
        )
    if admission.norm_ratio is not None:
        yield (
            f"{where} shows the server no single update, whose norm `admission.norm_ratio` {admission.norm_ratio:g} "
            "could be compared with; allowed with it: null, which is the default then"
        )
    if training.optimizer == "sgd" and training.max_grad_norm is None:
        yield (
            f"{where} needs a bound on every number of an update, and `training.optimizer` sgd without "
            "`max_grad_norm` has none; give `max_grad_norm`, or take adamw"
        )
    if not threshold <= clients < 2 * threshold:
        yield (
            f"{where} has `threshold` {threshold}, with `cohort.min_clients` {clients}; allowed: more than half of "
            f"them and no more than all, {clients // 2 + 1} to {clients}"
        )
