"""FedSA-LoRA: clients train A and B, the server averages A; every client keeps its own B.

Source: arXiv 2410.01463. A learns the knowledge that clients share, B the knowledge of one client, so each client ends
with its own model. The state holds no B.
"""

from collections.abc import Iterable
from typing import ClassVar

from common.config.strategy import FedSALoRAConfig
from common.errors import AggregationError
from common.model.adapters import LORA_B
from strategies.rule import Averaging


class FedSALoRARule(Averaging):
    """Averages A and a trained classification head."""

    section: ClassVar = FedSALoRAConfig

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All names.

        Raises:
            AggregationError: one of the names is a B.
        """
        del server_round
        active = list(names)
        for name in active:
            if name.endswith(LORA_B):
                raise AggregationError(f"{name} is in the state; FedSA-LoRA leaves B to the clients")
        return active
