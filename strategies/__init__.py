"""Federated strategies: one file each says what is sent, how replies are combined, what is reported.

``STRATEGIES`` is the one list of them. In any Flower app, ``from strategies import FedFTG, FlexLoRA, FFALoRA, FedSVD,
RoLoRA, FedIT, FedSALoRA, FedExLoRA, FLoRA`` gives them as Flower strategies. Each Flower strategy is made at its first
import, so that the rules themselves need no Flower.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from strategies.fedex_lora import FedExLoRARule
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.fedsa_lora import FedSALoRARule
from strategies.fedsvd import FedSVDRule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.flora import FLoRARule
from strategies.rolora import RoLoRARule
from strategies.rule import Rule

if TYPE_CHECKING:
    from strategies.flower.strategy import FlowerStrategy

#: Every strategy's rule by the strategy's name in a federation file; the rule names its section (``Rule.section``).
STRATEGIES: dict[str, type[Rule]] = {
    "fedftg": FedFTGRule,
    "flexlora": FlexLoRARule,
    "ffa-lora": FFALoRARule,
    "fedsvd": FedSVDRule,
    "rolora": RoLoRARule,
    "fedit": FedITRule,
    "fedsa-lora": FedSALoRARule,
    "fedex-lora": FedExLoRARule,
    "flora": FLoRARule,
}


def __getattr__(name: str) -> Callable[..., "FlowerStrategy"]:
    """The Flower strategy of a rule, by the rule's name without ``Rule``."""
    for rule in STRATEGIES.values():
        if rule.__name__ == f"{name}Rule":
            from strategies.flower.strategy import flower_strategy

            return flower_strategy(rule)
    raise AttributeError(f"module 'strategies' has no attribute {name!r}")
