"""What an aggregation rule is: plain tensors in, plain tensors out; no Flower, no I/O.

A rule is told the round, the global state and the clients' updates, and returns the next global state. Everything a
rule knows between rounds is in that state, so a checkpoint of the state is a checkpoint of the federation, and a
rule may be built anew in every round. ``strategies.flower.strategy`` makes a Flower strategy of a rule.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from common.config.aggregation import AggregationConfig, MeanConfig
from common.config.traits import StrategySection
from common.errors import AggregationError
from common.protocol.factors import Exchange, Factors
from common.protocol.tensors import Tensors as Tensors
from common.protocol.versions import Step
from strategies.combine.robust import Contribution, combine
from strategies.combine.weighted_mean import Drift, Means, applied


@dataclass(frozen=True)
class Update:
    """One client's admitted reply to one round.

    Attributes:
        client: the client's name, for messages.
        num_examples: how many training examples stand behind it (at least 1).
        tensors: the trained tensors by name; with ``factors``, exactly the round's active ones.
        lora_alpha: the client's own ``lora_alpha``, None when the rule has no LoRA or the client said nothing.
        factors: those that came as a change in low-rank factors instead.
    """

    client: str
    num_examples: int
    tensors: Tensors
    lora_alpha: float | None = None
    factors: dict[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of one round.

    Attributes:
        state: the whole next global state (tensors that were not active are carried over unchanged).
        diagnostics: scalars by name, e.g. ``{"client-cosine/model.layers.0": 0.31}``.
        step: what makes this state of the last one; None where the rule has no other form than the state itself.
    """

    state: Tensors
    diagnostics: dict[str, float] = field(default_factory=dict)
    step: Step | None = None


@dataclass(frozen=True)
class Setup:
    """What a rule is made of besides its strategy's section.

    Attributes:
        seed: of the federation.
        aggregation: how updates are combined; None: by their plain mean.
        whole: whether a server optimizer goes on with the average.
    """

    seed: int = 0
    aggregation: AggregationConfig | None = None
    whole: bool = False


class Rule(ABC):
    """How a strategy combines its clients' tensors. Stateless between rounds."""

    #: the strategy's section of a federation file, which has its traits.
    section: ClassVar[type[StrategySection]]
    #: the federation's LoRA alpha, when it has one.
    lora_alpha: float | None = None
    #: the largest LoRA rank a client may have where ranks are mixed; None: what its layers allow.
    max_rank: int | None = None

    @classmethod
    @abstractmethod
    def from_section(cls, config: Any, setup: Setup) -> Self:  # noqa: ANN401 - of the class ``section``
        """The rule that a federation file asks for; ``config`` is its strategy section."""

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """Names, of all in the state, that are trained and averaged in ``server_round`` (1, 2, ...). Default: all."""
        del server_round
        return list(names)

    def state_for(self, state: Mapping[str, Tensor], rank: int | None, lora_alpha: float | None) -> Tensors:
        """The state as a client of this LoRA rank and alpha must hold it. Default: the same for everybody."""
        del rank, lora_alpha
        return dict(state)

    def exchange(self, server_round: int) -> Exchange:
        """How changes of base weights travel in factors in ``server_round``. Default: exactly, in bases of its own."""
        del server_round
        return Exchange()

    @abstractmethod
    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> Outcome:
        """Combine the updates of a round, consuming each as it arrives.

        Args:
            server_round: Flower's round, starting with 1.
            state: the global state that the clients started from. Not modified.
            updates: admitted updates, in any order.

        Raises:
            AggregationError: there was no update, or the updates cannot be combined.
        """


class Averaging(Rule):
    """Rules that take the example-weighted mean of every active tensor: ``X <- sum_k p_k X_k``, p_k = n_k / sum n.

    Or combine them in another way (``strategies.combine.robust``), whose diagnostics they add. ``client-norm`` and
    ``client-cosine`` are those of all updates, as they came.
    """

    def __init__(self, lora_alpha: float | None = None, aggregation: AggregationConfig | None = None) -> None:
        """Make the rule.

        Args:
            lora_alpha: what all clients must have; None: whatever they have, if it is the same.
            aggregation: how updates are combined; None: by their plain mean.
        """
        self.lora_alpha = lora_alpha
        self.aggregation = aggregation or MeanConfig()

    @classmethod
    def from_section(cls, config: Any, setup: Setup) -> Self:  # noqa: ANN401
        """See ``Rule.from_section``. Default: a LoRA strategy without options of its own."""
        return cls(config.lora_alpha, setup.aggregation)

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> Outcome:
        """See ``Rule.aggregate``."""
        averaged, drift = self.averaged(server_round, state), Drift(state)

        def contributions() -> Iterator[Contribution]:
            first: tuple[str, float | None] | None = None
            for update in updates:
                if update.lora_alpha is not None:
                    first = first or (update.client, update.lora_alpha)
                if first is not None and update.lora_alpha not in (None, first[1]):
                    raise AggregationError(
                        f"lora-alpha is {first[1]} at {first[0]} and {update.lora_alpha} at "
                        f"{update.client}; factors can be averaged only when all clients have the same"
                    )
                tensors = {name: update.factors.get(name) or update.tensors[name] for name in averaged}
                drift.fold(tensors)
                yield Contribution(update.client, update.num_examples, tensors)
                del update, tensors

        means, told = combine(self.aggregation, state, contributions())
        return self.settle(server_round, state, means, {**drift.diagnostics(), **told})

    def averaged(self, server_round: int, names: Iterable[str]) -> list[str]:
        """Names of the tensors that are averaged. Default: those that the round trains."""
        return self.active(server_round, names)

    def settle(
        self, server_round: int, state: Mapping[str, Tensor], means: Means, diagnostics: dict[str, float]
    ) -> Outcome:
        """The next state, once all updates are combined."""
        del server_round
        return Outcome({**state, **applied(means, state)}, diagnostics)
