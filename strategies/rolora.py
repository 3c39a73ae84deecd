"""RoLoRA: rounds 1, 3, 5 ... train and average B with A frozen, rounds 2, 4, 6 ... train and average A with B frozen.

Source: arXiv 2502.01755. Each phase is exact, because the other factor is shared. B is trained first: while B = 0, A
has no gradient. The phase follows from the global round alone, so neither a server's restart nor a client's absence
can shift the phase.
"""

from collections.abc import Iterable
from typing import ClassVar

from common.config.strategy import RoLoRAConfig
from strategies.lora_names import LORA_A, LORA_B
from strategies.rule import Averaging


class RoLoRARule(Averaging):
    """Averages the round's factor and a trained classification head; the other factor is frozen."""

    section: ClassVar = RoLoRAConfig

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All names but those of A in odd rounds, all but those of B in even rounds."""
        frozen = LORA_A if server_round % 2 == 1 else LORA_B
        return [name for name in names if not name.endswith(frozen)]
