"""FedFTG: clients train the lower blocks' MLP weights with GaLore, the server averages the weights directly.

Source: arXiv 2410.23111, section 3. W <- sum_k p_k W_k over the trained tensors, accumulated in float32. Changes in
factors are averaged exactly, as factors, and the server sends the average as factors too, as long as the factors are
smaller than the weights (decision 005).
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from torch import Tensor

from common.config.aggregation import AggregationConfig
from common.config.strategy import FedFTGConfig
from common.protocol.factors import Exchange, Factors, Precision, rounding_error
from common.protocol.versions import Step
from strategies.combine.weighted_mean import Means
from strategies.rule import Averaging, RoundResult, Setup


class FedFTGRule(Averaging):
    """Averages base weights directly; any local optimizer will do.

    Adds the diagnostic ``wire-error/mean`` where factors are sent rounded: the relative error of the mean's factors.

    Args:
        precision: number format of factors on the wire, both ways.
        shared: seed and rank of the basis that all clients share in a round; None: every client has its own basis.
        aggregation: the aggregation method; None: the plain mean.
        whole: whether a server optimizer takes the mean. Then the mean is not rounded, and no step is made of it.
        downlink_rank: see ``Rule.downlink_rank``.
    """

    section: ClassVar = FedFTGConfig

    def __init__(
        self,
        precision: Precision = "float32",
        shared: tuple[int, int] | None = None,
        aggregation: AggregationConfig | None = None,
        *,
        whole: bool = False,
        downlink_rank: int | Literal["auto"] | None = None,
    ) -> None:
        super().__init__(None, aggregation)
        self._precision, self._shared, self._whole, self._downlink_rank = precision, shared, whole, downlink_rank

    @classmethod
    def from_section(cls, config: FedFTGConfig, setup: Setup) -> Self:
        """See ``Rule.from_section``."""
        return cls(
            config.wire_precision,
            config.shared(setup.seed),
            setup.aggregation,
            whole=setup.whole,
            downlink_rank=config.downlink_rank,
        )

    def downlink_rank(self) -> int | Literal["auto"] | None:
        """See ``Rule.downlink_rank``."""
        return self._downlink_rank

    def exchange(self, server_round: int) -> Exchange:
        """See ``Rule.exchange``."""
        return Exchange.of_round(server_round, self._precision, self._shared)

    def finalize(
        self, server_round: int, state: Mapping[str, Tensor], means: Means, diagnostics: dict[str, float]
    ) -> RoundResult:
        """The next state, computed from the rounded step, so that clients that apply the step get the same state."""
        if self._whole:
            return super().finalize(server_round, state, means, diagnostics)
        exchange = self.exchange(server_round)
        factored = {name: value for name, value in means.items() if isinstance(value, Factors)}
        if exchange.precision != "float32" and factored:
            shapes = {name: tuple(state[name].shape) for name in factored}
            diagnostics = {**diagnostics, "wire-error/mean": rounding_error(factored, shapes, exchange)}
        step = Step.of(server_round, means, state, exchange)
        return RoundResult(step.apply(state, exchange), diagnostics, step)
