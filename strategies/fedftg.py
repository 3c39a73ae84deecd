"""FedFTG: clients train the lower blocks' MLP weights with GaLore, the server averages the weights directly.

Source: arXiv 2410.23111, section 3. The average is example-weighted and accumulated in float32.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from torch import Tensor

from strategies.rule import Drift, Outcome, Rule, Update, WeightedMean


class FedFTGRule(Rule):
    """W <- sum_k p_k W_k over the trained tensors, p_k = n_k / sum n."""

    trains: ClassVar[Literal["weights", "lora"]] = "weights"

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> Outcome:
        """See ``Rule.aggregate``."""
        del server_round
        mean, drift = WeightedMean(state), Drift(state)
        for update in updates:
            mean.fold(update.tensors, update.num_examples)
            drift.fold(update.tensors)
        return Outcome({**state, **mean.mean()}, drift.diagnostics())
