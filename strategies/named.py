"""The five strategies by name: as Flower strategies for any Flower app, and as a federation file selects them."""

from typing import Literal, Unpack

from common.config import FedFTGConfig, FedITConfig, FFALoRAConfig, FlexLoRAConfig, RoLoRAConfig, StrategyConfig
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.flower import FlowerOptions, FlowerStrategy
from strategies.rolora import RoLoRARule
from strategies.rule import Rule


class FedFTG(FlowerStrategy):
    """Direct weight averaging (arXiv 2410.23111); see ``strategies.fedftg``."""

    def __init__(self, **options: Unpack[FlowerOptions]) -> None:
        super().__init__(FedFTGRule(), **options)


class FlexLoRA(FlowerStrategy):
    """Averages B A and splits it again, for clients of mixed rank (arXiv 2402.11505); see ``strategies.flexlora``."""

    def __init__(
        self,
        lora_alpha: float | None = None,
        *,
        rslora: bool = False,
        split: Literal["left", "sqrt"] = "left",
        **options: Unpack[FlowerOptions],
    ) -> None:
        super().__init__(FlexLoRARule(lora_alpha, rslora=rslora, split=split), **options)


class FFALoRA(FlowerStrategy):
    """A is frozen and shared, B is averaged (arXiv 2403.12313); see ``strategies.ffa_lora``."""

    def __init__(self, lora_alpha: float | None = None, **options: Unpack[FlowerOptions]) -> None:
        super().__init__(FFALoRARule(lora_alpha), **options)


class RoLoRA(FlowerStrategy):
    """B and A are averaged in alternate rounds (arXiv 2502.01755); see ``strategies.rolora``."""

    def __init__(self, lora_alpha: float | None = None, **options: Unpack[FlowerOptions]) -> None:
        super().__init__(RoLoRARule(lora_alpha), **options)


class FedIT(FlowerStrategy):
    """A and B are averaged separately, inexactly (arXiv 2305.05644); see ``strategies.fedit``."""

    def __init__(self, lora_alpha: float | None = None, **options: Unpack[FlowerOptions]) -> None:
        super().__init__(FedITRule(lora_alpha), **options)


def make_rule(config: StrategyConfig, *, seed: int) -> Rule:
    """The rule that a federation file names."""
    match config:
        case FedFTGConfig():
            shared = (seed, config.rank) if config.subspace == "shared" else None
            return FedFTGRule(config.wire_precision, shared)
        case FlexLoRAConfig():
            return FlexLoRARule(config.lora_alpha, rslora=config.rslora, split=config.split, max_rank=config.rank)
        case FFALoRAConfig():
            return FFALoRARule(config.lora_alpha)
        case RoLoRAConfig():
            return RoLoRARule(config.lora_alpha)
        case FedITConfig():
            return FedITRule(config.lora_alpha)


def make_strategy(config: StrategyConfig, *, seed: int) -> FlowerStrategy:
    """The strategy that a federation file names, ready for FedSpan's round loop."""
    return FlowerStrategy(make_rule(config, seed=seed), seed=seed)
