"""FedIT: clients train A and B, the server averages A and B separately.

Source: arXiv 2305.05644. The inexact baseline: with means A and B, B A is not the mean of the B_k A_k. The error,
sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A), is reported in every round.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from common.config.aggregation import MeanConfig
from common.config.strategy import FedITConfig
from common.linalg.lowrank import Term, inner_products
from strategies.combine.weighted_mean import layer_group
from strategies.lora_names import pairs
from strategies.rule import Averaging, RoundResult, Tensors, Update


class FedITRule(Averaging):
    """Averages A, B and a trained classification head separately.

    Adds the diagnostic ``aggregation-error/<group>``: ``|exact - B A|_F / |exact|_F`` over a group's layers, where
    exact = sum_k p_k B_k A_k. Robust aggregation has no such diagnostic: it does not aim at the exact mean.
    """

    section: ClassVar = FedITConfig

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> RoundResult:
        """See ``Rule.aggregate``."""
        if self.aggregation != MeanConfig():
            return super().aggregate(server_round, state, updates)
        names = pairs(state)
        kept: list[Update] = []

        def keeping() -> Iterator[Update]:
            for update in updates:
                kept.append(update)
                yield update

        outcome = super().aggregate(server_round, state, keeping())
        errors: dict[str, float] = {}
        exact: dict[str, float] = {}
        for a, b in names:
            group = layer_group(a)
            errors[group] = errors.get(group, 0.0) + _square(kept, a, b, outcome.state)
            exact[group] = exact.get(group, 0.0) + _square(kept, a, b, None)
        lost = {f"aggregation-error/{g}": (errors[g] / exact[g]) ** 0.5 for g in errors if exact[g] > 0}
        return RoundResult(outcome.state, {**outcome.diagnostics, **lost})


def _square(updates: list[Update], a: str, b: str, centre: Tensors | None) -> float:
    """``|sum_k p_k (B_k - B)(A_k - A)|_F^2``; B and A are taken from ``centre``, or zero when it is None."""
    total = sum(update.num_examples for update in updates)
    terms = []
    for update in updates:
        factors = (update.tensors[b].float(), update.tensors[a].float())
        if centre is not None:
            factors = (factors[0] - centre[b].float(), factors[1] - centre[a].float())
        terms.append(Term(update.num_examples / total, *factors))
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64)
    return max(0.0, float(weights @ inner_products(terms, a) @ weights))
