"""All strategies by name: as Flower strategies for any Flower app, and as a federation file selects them.

All but FlexLoRA and FedEx-LoRA take ``aggregation``: a section of ``common.config.federation`` such as
``MedianConfig()``; None is the plain mean.
"""

from typing import Literal, Unpack

from common.config.federation import (
    AggregationConfig,
    FedExLoRAConfig,
    FedFTGConfig,
    FedITConfig,
    FedSALoRAConfig,
    FFALoRAConfig,
    FlexLoRAConfig,
    FLoRAConfig,
    MeanConfig,
    RoLoRAConfig,
    ServerOptimizerConfig,
    StrategyConfig,
)
from strategies.fedex_lora import FedExLoRARule
from strategies.fedftg import FedFTGRule
from strategies.fedit import FedITRule
from strategies.fedsa_lora import FedSALoRARule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.flora import FLoRARule
from strategies.flower.strategy import FlowerOptions, FlowerStrategy
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


class FedSALoRA(FlowerStrategy):
    """A is averaged, B stays at the clients (arXiv 2410.01463); see ``strategies.fedsa_lora``."""

    def __init__(
        self,
        lora_alpha: float | None = None,
        *,
        aggregation: AggregationConfig | None = None,
        **options: Unpack[FlowerOptions],
    ) -> None:
        super().__init__(FedSALoRARule(lora_alpha, aggregation), **options)


class FedExLoRA(FlowerStrategy):
    """A and B are averaged, the base weights take what that loses (arXiv 2410.09432); see ``strategies.fedex_lora``."""

    def __init__(self, lora_alpha: float, *, rslora: bool = False, **options: Unpack[FlowerOptions]) -> None:
        super().__init__(FedExLoRARule(lora_alpha, rslora=rslora), **options)


class FLoRA(FlowerStrategy):
    """All clients' B A go into the base weights (arXiv 2409.05976); see ``strategies.flora``."""

    def __init__(
        self,
        lora_alpha: float,
        *,
        rslora: bool = False,
        aggregation: AggregationConfig | None = None,
        **options: Unpack[FlowerOptions],
    ) -> None:
        super().__init__(FLoRARule(lora_alpha, aggregation, rslora=rslora, seed=options.get("seed", 0)), **options)


def make_rule(
    config: StrategyConfig, *, seed: int, aggregation: AggregationConfig | None = None, whole: bool = False
) -> Rule:
    """The rule that a federation file names.

    Args:
        config: the file's strategy section.
        seed: of the federation.
        aggregation: None: the plain mean, the only one for FlexLoRA and FedEx-LoRA.
        whole: whether a server optimizer goes on with the average.

    Raises:
        ValueError: FlexLoRA or FedEx-LoRA, and another aggregation.
    """
    if isinstance(config, FlexLoRAConfig | FedExLoRAConfig) and aggregation not in (None, MeanConfig()):
        raise ValueError(f"{config.name}: aggregation is {aggregation!r}; allowed: the plain mean")
    match config:
        case FedFTGConfig():
            shared = (seed, config.rank) if config.subspace == "shared" else None
            return FedFTGRule(config.wire_precision, shared, aggregation, whole=whole)
        case FlexLoRAConfig():
            return FlexLoRARule(config.lora_alpha, rslora=config.rslora, split=config.split, max_rank=config.rank)
        case FFALoRAConfig():
            return FFALoRARule(config.lora_alpha, aggregation)
        case RoLoRAConfig():
            return RoLoRARule(config.lora_alpha, aggregation)
        case FedITConfig():
            return FedITRule(config.lora_alpha, aggregation)
        case FedSALoRAConfig():
            return FedSALoRARule(config.lora_alpha, aggregation)
        case FedExLoRAConfig():
            return FedExLoRARule(config.lora_alpha, rslora=config.rslora)
        case FLoRAConfig():
            rslora, rank = config.rslora, config.rank
            return FLoRARule(config.lora_alpha, aggregation, rslora=rslora, max_rank=rank, seed=seed)


def make_strategy(
    config: StrategyConfig,
    *,
    seed: int,
    aggregation: AggregationConfig | None = None,
    server_optimizer: ServerOptimizerConfig | None = None,
) -> FlowerStrategy:
    """The strategy that a federation file names, ready for FedSpan's round loop; see ``make_rule``."""
    rule = make_rule(config, seed=seed, aggregation=aggregation, whole=server_optimizer is not None)
    return FlowerStrategy(rule, seed=seed, server_optimizer=server_optimizer)
