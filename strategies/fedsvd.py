"""FedSVD: clients train B, the server averages B, and draws A anew from the SVD of the product.

Source: arXiv 2505.12805. A is the same at all clients, so the average is exact, as in FFA-LoRA; then the mean product
B A = U S V^T is written as (U S) (V^T). The model does not change by that, but A follows the directions that training
has found, its rows are orthonormal, and noise on B is not amplified by A. The released code also leaves the first A as
it is drawn. B A is never formed (``common.linalg.lowrank``, decision 004).
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from common.config.strategy import FedSVDConfig
from common.linalg.lowrank import Term, truncated_svd
from strategies.combine.weighted_mean import Means
from strategies.flexlora import split
from strategies.lora_names import LORA_A, pairs
from strategies.rule import Averaging, RoundResult


class FedSVDRule(Averaging):
    """Averages B and a trained classification head; makes the rows of A orthonormal without a change of B A."""

    section: ClassVar = FedSVDConfig

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All names but those of A."""
        del server_round
        return [name for name in names if not name.endswith(LORA_A)]

    def finalize(
        self, server_round: int, state: Mapping[str, Tensor], means: Means, diagnostics: dict[str, float]
    ) -> RoundResult:
        """See ``Averaging.finalize``."""
        outcome = super().finalize(server_round, state, means, diagnostics)
        for a, b in pairs(state):
            svd = truncated_svd([Term(1.0, outcome.state[b].float(), state[a])], len(state[a]), a.removesuffix(LORA_A))
            outcome.state[a], outcome.state[b] = split(svd, state[a], 1.0)
        return outcome
