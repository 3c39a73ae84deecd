"""RoLoRA: rounds 1, 3, 5 ... train and average B with A frozen, rounds 2, 4, 6 ... train and average A with B frozen.

Source: arXiv 2502.01755. Each phase is exact, because the other factor is shared. B goes first: B = 0 at the start
gives A no gradient. The phase follows from the global round alone, so a restart or an absence cannot shift it.
"""

from collections.abc import Iterable
from typing import ClassVar

from common.config.strategy import RoLoRAConfig
from strategies.lora_names import LORA_A, LORA_B
from strategies.rule import Averaging


class RoLoRARule(Averaging):
    """The round's factor, and a trained classification head, are averaged; the other factor rests."""

    section: ClassVar = RoLoRAConfig

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All but A in odd rounds, all but B in even ones."""
        resting = LORA_A if server_round % 2 == 1 else LORA_B
        return [name for name in names if not name.endswith(resting)]
