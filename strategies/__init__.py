"""Federated strategies: one file each says what is sent, how replies are combined, what is reported.

``from strategies import FedFTG, FlexLoRA, FFALoRA, RoLoRA, FedIT, FedSALoRA, FedExLoRA, FLoRA`` gives them as Flower
strategies. They are imported when asked for, so that the rules themselves need no Flower.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategies.flower.named import FedExLoRA, FedFTG, FedIT, FedSALoRA, FFALoRA, FlexLoRA, FLoRA, RoLoRA

__all__ = ["FFALoRA", "FLoRA", "FedExLoRA", "FedFTG", "FedIT", "FedSALoRA", "FlexLoRA", "RoLoRA"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'strategies' has no attribute {name!r}")
    from strategies.flower import named

    return getattr(named, name)
