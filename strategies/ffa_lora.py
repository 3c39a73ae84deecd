"""FFA-LoRA: A is drawn once and stays frozen, clients train B, the server averages B.

Source: arXiv 2403.12313. Exact, because A is shared: s (sum_k p_k B_k) A = sum_k p_k (s B_k A).
"""

from collections.abc import Iterable
from typing import ClassVar

from common.config.strategy import FFALoRAConfig
from strategies.lora_names import LORA_A
from strategies.rule import Averaging


class FFALoRARule(Averaging):
    """Averages B and a trained classification head; A never changes."""

    section: ClassVar = FFALoRAConfig

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """All names but those of A."""
        del server_round
        return [name for name in names if not name.endswith(LORA_A)]
