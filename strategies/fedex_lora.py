"""FedEx-LoRA: the server averages A and B separately, and adds the error of these averages to the base weights.

Source: arXiv 2410.09432. With means A and B, W <- W + sum_k p_k s B_k A_k - s B A. Then W + s B A is exactly the mean
of the clients' W + s B_k A_k. The added residual has rank (K + 1) r at most; the server sends it as factors as long as
the factors are smaller than the weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Self

from torch import Tensor

from common.config.strategy import FedExLoRAConfig
from common.model.adapters import BASE_WEIGHT, scaling
from common.protocol.factors import Factors
from common.protocol.versions import Step
from strategies.combine.weighted_mean import WeightedMean, change_square, layer_group
from strategies.lora_names import layers
from strategies.rule import Averaging, RoundResult, Setup, Tensors, Update


class FedExLoRARule(Averaging):
    """Averages A, B and a trained classification head separately; the state holds the base weights as well.

    Adds the diagnostic ``residual/<group>``: ``|added to the base weights|_F / |sum_k p_k s B_k A_k|_F`` over a group's
    layers. This is the aggregation error that FedIT makes.

    Args:
        lora_alpha: the LoRA alpha of all clients.
        rslora: scaling lora_alpha / sqrt(rank) instead of lora_alpha / rank.
    """

    section: ClassVar = FedExLoRAConfig

    def __init__(self, lora_alpha: float, *, rslora: bool = False) -> None:
        super().__init__(lora_alpha)
        self._alpha, self._rslora = lora_alpha, rslora

    @classmethod
    def from_section(cls, config: FedExLoRAConfig, setup: Setup) -> Self:
        """See ``Rule.from_section``."""
        del setup
        return cls(config.lora_alpha, rslora=config.rslora)

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All but the base weights."""
        del server_round
        return [name for name in names if not name.endswith(BASE_WEIGHT)]

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> RoundResult:
        """See ``Rule.aggregate``."""
        found, mean = layers(state), WeightedMean(state)

        def folding() -> Iterator[Update]:
            for update in updates:
                products = {weight: self._product(update.tensors[a], update.tensors[b]) for a, b, weight in found}
                mean.fold(products, update.num_examples)
                yield update
                del update

        averaged = super().aggregate(server_round, state, folding())
        exact = mean.means()
        added: dict[str, Tensor | Factors] = {}
        squares: dict[str, list[float]] = {}
        for a, b, weight in found:
            whole, start = exact[weight], state[weight]
            ((left, right),) = self._product(averaged.state[a], averaged.state[b]).terms
            if isinstance(whole, Factors):
                added[weight] = Factors(1.0, [*whole.terms, (-left, right)])
            else:
                added[weight] = whole.to(left.dtype).addmm(left, right, alpha=-1.0).to(start.dtype)
            sums = squares.setdefault(layer_group(a), [0.0, 0.0])
            sums[0] += change_square(added[weight], start)
            sums[1] += change_square(whole, start)
        told = {f"residual/{group}": (lost / all_) ** 0.5 for group, (lost, all_) in squares.items() if all_ > 0}
        exchange = self.exchange(server_round)
        means: Tensors = {name: averaged.state[name] for name in self.active(server_round, state)}
        step = Step.of(server_round, {**means, **added}, state, exchange)
        return RoundResult(step.apply(state, exchange), {**averaged.diagnostics, **told}, step)

    def _product(self, a: Tensor, b: Tensor) -> Factors:
        """The product s B A as a change of the base weight."""
        return Factors(1.0, [(b.float() * scaling(self._alpha, len(a), rslora=self._rslora), a.float())])
