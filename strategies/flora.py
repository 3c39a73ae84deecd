"""FLoRA: the server stacks the clients' factors and adds their product to the base weights; then A and B are reset.

Source: arXiv 2409.05976. W <- W + sum_k p_k s_k B_k A_k, exactly, for clients of any rank: the sum is the product of
[p_1 s_1 B_1, p_2 s_2 B_2, ...] and [A_1; A_2; ...]. The server sends these stacked factors as long as they are smaller
than the weight. Each round starts with B = 0 and a new random A, drawn at the server; a client of rank r takes the
first r rows of A.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from common.config.aggregation import AggregationConfig
from common.config.strategy import FLoRAConfig
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B, cut, fresh_a, scaling
from common.protocol.factors import Factors
from common.protocol.versions import Step
from strategies.combine.stale import added
from strategies.combine.weighted_mean import Means
from strategies.lora_names import layers
from strategies.rule import Averaging, RoundResult, Setup, Tensors, Update


class FLoRARule(Averaging):
    """Adds the mean product to the base weights, which the state holds as well; averages a trained head.

    ``client-norm`` and ``client-cosine`` are computed from the products s_k B_k A_k.
    """

    section: ClassVar = FLoRAConfig

    def __init__(
        self,
        lora_alpha: float,
        aggregation: AggregationConfig | None = None,
        *,
        rslora: bool = False,
        max_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """Make the rule.

        Args:
            lora_alpha: LoRA alpha of clients that report none.
            aggregation: the aggregation method for the products; None: the plain mean.
            rslora: scaling lora_alpha / sqrt(rank) instead of lora_alpha / rank.
            max_rank: the largest rank of a client; None: the layers' smaller sides.
            seed: seed from which every round's new A is drawn.
        """
        super().__init__(lora_alpha, aggregation)
        self.max_rank = max_rank
        self._alpha, self._rslora, self._seed = lora_alpha, rslora, seed

    @classmethod
    def from_section(cls, config: FLoRAConfig, setup: Setup) -> Self:
        """See ``Rule.from_section``."""
        rslora, rank = config.rslora, config.rank
        return cls(config.lora_alpha, setup.aggregation, rslora=rslora, max_rank=rank, seed=setup.seed)

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All but the base weights."""
        del server_round
        return [name for name in names if not name.endswith(BASE_WEIGHT)]

    def averaged(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All names but those of A and B."""
        del server_round
        return [name for name in names if not name.endswith((LORA_A, LORA_B))]

    def state_for(self, state: Mapping[str, Tensor], rank: int | None, lora_alpha: float | None) -> Tensors:
        """The state with A and B cut to the client's rank."""
        del lora_alpha
        return dict(state) if rank is None else cut(state, rank)

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> RoundResult:
        """See ``Rule.aggregate``."""
        found = layers(state)
        return super().aggregate(server_round, state, (self._merged(update, found) for update in updates))

    def carried_over(
        self, update: Update, start: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float
    ) -> Update:
        """See ``Rule.carried_over``. The change is the product B A, whose A is the client's; B counts less."""
        pairs = {name: tensor for name, tensor in update.tensors.items() if name.endswith((LORA_A, LORA_B))}
        rest = {name: tensor for name, tensor in update.tensors.items() if name not in pairs}
        scaled = {name: t.float() * share if name.endswith(LORA_B) else t for name, t in pairs.items()}
        return replace(update, tensors={**scaled, **added(rest, start, state, share)})

    def finalize(
        self, server_round: int, state: Mapping[str, Tensor], means: Means, diagnostics: dict[str, float]
    ) -> RoundResult:
        """The next state, with a fresh A and B = 0."""
        exchange, fresh = self.exchange(server_round), {}
        for a, b, _ in layers(state):
            fresh[a] = fresh_a(self._seed, server_round + 1, a, state[a].shape).to(state[a].dtype)
            if state[b].any():
                fresh[b] = torch.zeros_like(state[b])
        step = Step.of(server_round, {**means, **fresh}, state, exchange)
        return RoundResult(step.apply(state, exchange), diagnostics, step)

    def _merged(self, update: Update, found: list[tuple[str, str, str]]) -> Update:
        """The update with A_k and B_k replaced by their products s_k B_k A_k, as changes of the base weights."""
        alpha, tensors = update.lora_alpha or self._alpha, dict(update.tensors)
        products = {}
        for name_a, name_b, weight in found:
            a, b = tensors.pop(name_a).float(), tensors.pop(name_b).float()
            products[weight] = Factors(1.0, [(b * scaling(alpha, len(a), rslora=self._rslora), a)])
        return replace(update, tensors=tensors, factors=products, lora_alpha=None, norms={})
