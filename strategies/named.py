"""The five strategies by name: as Flower strategies for any Flower app, and as a federation file selects them.

All but FlexLoRA, which averages products, take ``aggregation``: a section of ``common.config`` such as
``MedianConfig()``; None is the plain mean.
"""

from typing import Literal, Unpack

from common.config import (
    AggregationConfig,
    FedFTGConfig,
    FedITConfig,
    FFALoRAConfig,
    FlexLoRAConfig,
    MeanConfig,
    RoLoRAConfig,
    StrategyConfig,
)
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.flower import FlowerOptions, FlowerStrategy
from strategies.rolora import RoLoRARule
from strategies.rule import Rule


class FedFTG(FlowerStrategy):
    """Direct weight averaging (arXiv 2410.23111); see ``strategies.fedftg``."""

    def __init__(self, *, aggregation: AggregationConfig | None = None, **options: Unpack[FlowerOptions]) -> None:
        super().__init__(FedFTGRule(aggregation=aggregation), **options)


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

    def __init__(
        self,
        lora_alpha: float | None = None,
        *,
        aggregation: AggregationConfig | None = None,
        **options: Unpack[FlowerOptions],
    ) -> None:
        super().__init__(FFALoRARule(lora_alpha, aggregation), **options)


class RoLoRA(FlowerStrategy):
    """B and A are averaged in alternate rounds (arXiv 2502.01755); see ``strategies.rolora``."""

    def __init__(
        self,
        lora_alpha: float | None = None,
        *,
        aggregation: AggregationConfig | None = None,
        **options: Unpack[FlowerOptions],
    ) -> None:
        super().__init__(RoLoRARule(lora_alpha, aggregation), **options)


class FedIT(FlowerStrategy):
    """A and B are averaged separately, inexactly (arXiv 2305.05644); see ``strategies.fedit``."""

    def __init__(
        self,
        lora_alpha: float | None = None,
        *,
        aggregation: AggregationConfig | None = None,
        **options: Unpack[FlowerOptions],
    ) -> None:
        super().__init__(FedITRule(lora_alpha, aggregation), **options)


def make_rule(config: StrategyConfig, *, seed: int, aggregation: AggregationConfig | None = None) -> Rule:
    """The rule that a federation file names; ``aggregation`` None: the plain mean, the only one for FlexLoRA.

    Raises:
        ValueError: FlexLoRA and another aggregation.
    """
    match config:
        case FedFTGConfig():
            shared = (seed, config.rank) if config.subspace == "shared" else None
            return FedFTGRule(config.wire_precision, shared, aggregation)
        case FlexLoRAConfig():
            if aggregation not in (None, MeanConfig()):
                raise ValueError(f"flexlora averages products; aggregation is {aggregation!r}, allowed: the plain mean")
            return FlexLoRARule(config.lora_alpha, rslora=config.rslora, split=config.split, max_rank=config.rank)
        case FFALoRAConfig():
            return FFALoRARule(config.lora_alpha, aggregation)
        case RoLoRAConfig():
            return RoLoRARule(config.lora_alpha, aggregation)
        case FedITConfig():
            return FedITRule(config.lora_alpha, aggregation)


def make_strategy(config: StrategyConfig, *, seed: int, aggregation: AggregationConfig | None = None) -> FlowerStrategy:
    """The strategy that a federation file names, ready for FedSpan's round loop; see ``make_rule``."""
    return FlowerStrategy(make_rule(config, seed=seed, aggregation=aggregation), seed=seed)
