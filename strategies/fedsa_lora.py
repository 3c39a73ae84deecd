"""FedSA-LoRA: clients train A and B, the server averages A; every client keeps its own B.

Source: arXiv 2410.01463. A is what the clients have in common, B what sets them apart, so that each ends with a model
of its own. The state holds no B.
"""

from collections.abc import Iterable
from typing import ClassVar

from common.config.strategy import FedSALoRAConfig
from common.errors import AggregationError
from common.model.adapters import LORA_B
from strategies.rule import Averaging


class FedSALoRARule(Averaging):
    """A, and a trained classification head, are averaged."""

    section: ClassVar = FedSALoRAConfig

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All.

        Raises:
            AggregationError: there is a B among them.
        """
        del server_round
        active = list(names)
        for name in active:
            if name.endswith(LORA_B):
                raise AggregationError(f"{name} is in the state; FedSA-LoRA leaves B to the clients")
        return active
