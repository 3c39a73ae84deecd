"""The interface of an aggregation rule: plain tensors in, plain tensors out; no Flower, no I/O.

A rule takes the round, the global state and the clients' updates, and returns the next global state. A rule keeps
nothing else between rounds, so a checkpoint of the state is a checkpoint of the federation, and each round may use a
new instance of the rule. ``strategies.flower.strategy`` makes a Flower strategy of a rule.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from common.config.aggregation import AggregationConfig, MeanConfig
from common.config.traits import StrategySection
from common.errors import AggregationError
from common.protocol.factors import Exchange, Factors
from common.protocol.tensors import Tensors as Tensors
from common.protocol.versions import Step
from strategies.combine.robust import Contribution, combine
from strategies.combine.stale import added, shrunk
from strategies.combine.weighted_mean import Drift, Means, applied


@dataclass(frozen=True)
class Update:
    """One client's admitted reply to one round.

    Attributes:
        client: the client's name, for messages.
        num_examples: number of training examples (at least 1).
        tensors: trained tensors that came dense, by name. ``tensors`` and ``factors`` together hold exactly the
            round's active tensors.
        lora_alpha: the client's LoRA alpha; None when the rule has no LoRA or the client reported none.
        factors: changes of trained tensors that came as low-rank factors, by name.
        age: number of versions that were made since the one that the client started from; see ``Rule.carried_over``.
        norms: L2 norm of every tensor's change, by name, as admission has computed it; empty: it is not known.
    """

    client: str
    num_examples: int
    tensors: Tensors
    lora_alpha: float | None = None
    factors: dict[str, Factors] = field(default_factory=dict)
    age: int = 0
    norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundResult:
    """The result of one round.

    Attributes:
        state: the complete next global state (tensors that were not active are unchanged).
        diagnostics: scalars by name, e.g. ``{"client-cosine/model.layers.0": 0.31}``.
        step: the change from the last state to this one; None: the rule produces no steps, clients are sent tensors.
    """

    state: Tensors
    diagnostics: dict[str, float] = field(default_factory=dict)
    step: Step | None = None


@dataclass(frozen=True)
class Setup:
    """Settings of a rule that are not in the strategy's section.

    Attributes:
        seed: the federation's seed.
        aggregation: the aggregation method; None: the plain mean.
        whole: whether a server optimizer takes the average, which must then be dense and unrounded.
    """

    seed: int = 0
    aggregation: AggregationConfig | None = None
    whole: bool = False


class Rule(ABC):
    """How a strategy aggregates its clients' tensors. Stateless between rounds.

    Example:
        FFA-LoRA freezes A and averages B by examples.

        >>> from torch import tensor
        >>> from strategies import FFALoRARule
        >>> a, b = "layer.lora_A.weight", "layer.lora_B.weight"
        >>> state = {a: tensor([[1.0, 2.0]]), b: tensor([[0.0]])}  # A (rank 1, in 2), B (out 1, rank 1)
        >>> rule = FFALoRARule(lora_alpha=8.0)
        >>> rule.active(1, state)
        ['layer.lora_B.weight']
        >>> updates = [Update("north", 100, {b: tensor([[4.0]])}), Update("south", 300, {b: tensor([[8.0]])})]
        >>> rule.aggregate(1, state, iter(updates)).state[b]
        tensor([[7.]])
    """

    #: class of the strategy's section in a federation file; the class attributes are the strategy's traits.
    section: ClassVar[type[StrategySection]]
    #: the federation's LoRA alpha; None: there is none, or clients report their own.
    lora_alpha: float | None = None
    #: the largest LoRA rank that a client may have where ranks are mixed; None: the layers' smaller sides.
    max_rank: int | None = None

    @classmethod
    @abstractmethod
    def from_section(cls, config: Any, setup: Setup) -> Self:  # noqa: ANN401 - of the class ``section``
        """Make the rule of a federation file; ``config`` is the file's strategy section."""

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """The tensors, among the state's ``names``, that ``server_round`` (1, 2, ...) trains. Default: all."""
        del server_round
        return list(names)

    def state_for(self, state: Mapping[str, Tensor], rank: int | None, lora_alpha: float | None) -> Tensors:
        """The state to send to a client of this LoRA rank and alpha. Default: the same for all clients."""
        del rank, lora_alpha
        return dict(state)

    def exchange(self, server_round: int) -> Exchange:
        """Form of the factors that clients send in ``server_round``. Default: float32, each client in its own basis."""
        del server_round
        return Exchange()

    def carried_over(
        self, update: Update, start: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float
    ) -> Update:
        """An update of an earlier version as one of the current version (``strategies.combine.stale``).

        Only for rules whose section allows it (``StrategySection.stale_updates_impossible``). Default: ``share`` of the
        change is added to ``state``, tensor by tensor.

        Args:
            update: the update, whose ``age`` is known.
            start: the state that the client started from.
            state: the current state.
            share: the part of the change that counts.
        """
        factors = shrunk(update.factors, state, share)
        return replace(update, tensors=added(update.tensors, start, state, share), factors=factors)

    def downlink_rank(self) -> int | Literal["auto"] | None:
        """Most directions of a weight's change that a round sends down (``strategies.way_down``); None: all."""
        return None

    @abstractmethod
    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> RoundResult:
        """Aggregate the updates of a round, each as it arrives.

        Args:
            server_round: Flower's round, which starts at 1.
            state: the global state that the clients started from. Not modified.
            updates: admitted updates, in any order.

        Raises:
            AggregationError: there was no update, or the updates cannot be aggregated.
        """


class Averaging(Rule):
    """Rules that take the example-weighted mean of every active tensor: ``X <- sum_k p_k X_k``, p_k = n_k / sum n.

    With another ``aggregation`` a robust method replaces the mean and adds its diagnostics
    (``strategies.combine.robust``). ``client-norm`` and ``client-cosine`` are computed from all updates before clipping
    or selection.
    """

    def __init__(self, lora_alpha: float | None = None, aggregation: AggregationConfig | None = None) -> None:
        """Make the rule.

        Args:
            lora_alpha: the LoRA alpha that all clients must have; None: any, if all clients have the same.
            aggregation: the aggregation method; None: the plain mean.
        """
        self.lora_alpha = lora_alpha
        self.aggregation = aggregation or MeanConfig()

    @classmethod
    def from_section(cls, config: Any, setup: Setup) -> Self:  # noqa: ANN401
        """See ``Rule.from_section``. Default: a LoRA strategy without further options."""
        return cls(config.lora_alpha, setup.aggregation)

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> RoundResult:
        """See ``Rule.aggregate``."""
        return self.finalize(server_round, state, *self.average(server_round, state, updates))

    def average(
        self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]
    ) -> tuple[Means, dict[str, float]]:
        """The aggregated tensors, or changes in factors, and the diagnostics; see ``Rule.aggregate``."""
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
                drift.fold(tensors, update.norms)
                yield Contribution(update.client, update.num_examples, tensors)
                del update, tensors

        means, told = combine(self.aggregation, state, contributions())
        return means, {**drift.diagnostics(), **told}

    def averaged(self, server_round: int, names: Iterable[str]) -> list[str]:
        """The tensors, among the state's ``names``, that are averaged. Default: those that the round trains."""
        return self.active(server_round, names)

    def finalize(
        self, server_round: int, state: Mapping[str, Tensor], means: Means, diagnostics: dict[str, float]
    ) -> RoundResult:
        """Make the next state of the aggregated ``means``."""
        del server_round
        return RoundResult({**state, **applied(means, state)}, diagnostics)
