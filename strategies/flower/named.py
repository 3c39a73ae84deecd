"""Make the strategy that a federation file names: as a rule, or for the round loop."""

from common.config.aggregation import AggregationConfig, MeanConfig, ServerOptimizerConfig
from common.config.strategy import StrategyConfig
from strategies import STRATEGIES
from strategies.flower.strategy import FlowerStrategy
from strategies.rule import Rule, Setup


def make_rule(
    config: StrategyConfig, *, seed: int, aggregation: AggregationConfig | None = None, whole: bool = False
) -> Rule:
    """Make the rule that a federation file names.

    Args:
        config: the file's strategy section.
        seed: the federation's seed.
        aggregation: the aggregation method; None: the plain mean. Some strategies allow no other.
        whole: whether a server optimizer takes the average.

    Raises:
        ValueError: the strategy allows the plain mean only, and ``aggregation`` is another method.
    """
    if config.plain_mean_only is not None and aggregation not in (None, MeanConfig()):
        raise ValueError(f"{config.name}: aggregation is {aggregation!r}; allowed: the plain mean")
    return STRATEGIES[config.name].from_section(config, Setup(seed, aggregation, whole))


def make_strategy(
    config: StrategyConfig,
    *,
    seed: int,
    aggregation: AggregationConfig | None = None,
    server_optimizer: ServerOptimizerConfig | None = None,
) -> FlowerStrategy:
    """Make the strategy that a federation file names, for FedSpan's round loop; see ``make_rule``."""
    rule = make_rule(config, seed=seed, aggregation=aggregation, whole=server_optimizer is not None)
    return FlowerStrategy(rule, seed=seed, server_optimizer=server_optimizer)
