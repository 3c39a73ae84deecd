"""The experiment file: one federation, many ways to run it. See ``fedspan experiment``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator

from common.config.load import load, parse
from common.config.section import DataConfig, Name, Section
from common.errors import ConfigError
from common.metrics import SCORES

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
#: Keys of the federation that the experiment itself sets, with the experiment's key to use instead.
_DECIDED = {
    "name": "`name` of the experiment",
    "strategy": "`grid.strategies`",
    "local": "`data.sites`",
    "evaluation.server": "`data.validation` and `data.test`",
    "training.learning_rate": "`grid.learning_rates`",
    "training.seed": "`grid.seeds`",
    "best": "`score_at` best; a final run must not stop by the test set",
}


class StrategyChoice(Section):
    """A strategy with its options, as in a federation file, and with the experiment's own keys."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str = Field(description="As in a federation file; further keys are the strategy's own.")
    label: Name | None = Field(None, description="The strategy's name in the comparison; default: `name`.")
    learning_rates: list[Rate] | None = Field(None, min_length=1, description="Default: the grid's learning rates.")

    @property
    def called(self) -> str:
        """The strategy's name in folders and in the comparison."""
        return self.label or self.name

    @property
    def section(self) -> dict[str, Any]:
        """The federation file's section."""
        return {"name": self.name, **(self.model_extra or {})}


class GridConfig(Section):
    """The varied keys: every combination is a setting; each setting is run with every seed."""

    strategies: list[StrategyChoice] = Field(min_length=1)
    clients: list[Count] = Field(min_length=1, description="Numbers of sites; keys of `data.sites`.")
    alphas: list[Rate] | None = Field(
        None, min_length=1, description="Partitions: put for {alpha} into the folders of `data.sites`."
    )
    ranks: list[Count] | None = Field(None, min_length=1, description="Default: each strategy's own.")
    local_steps: list[Count] | None = Field(None, min_length=1, description="Default: the federation's.")
    learning_rates: list[Rate] = Field(min_length=1, description="Learning rates for strategies without their own.")
    extend: int = Field(
        0,
        ge=0,
        description="Most further learning rates of a setting: as long as the best one is the smallest or the largest "
        "of those tried, the next one in the same ratio is tried, too.",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)

    @field_validator("clients", "alphas", "ranks", "local_steps", "learning_rates", "seeds")
    @classmethod
    def _once(cls, values: list[float] | None) -> list[float] | None:
        _refuse_twice(values or [])
        return values

    @field_validator("strategies")
    @classmethod
    def _named_once(cls, strategies: list[StrategyChoice]) -> list[StrategyChoice]:
        _refuse_twice([s.called for s in strategies], "; give one of them a `label`")
        for choice in strategies:
            _refuse_twice(choice.learning_rates or [], f" in `learning_rates` of {choice.called}")
        return strategies

    @model_validator(mode="after")
    def _ratio(self) -> Self:
        if self.extend and all(len(s.learning_rates or self.learning_rates) == 1 for s in self.strategies):
            raise ValueError(
                f"`extend` is {self.extend}, and every strategy has one learning rate; give two, whose ratio it takes"
            )
        return self


class ExperimentData(Section):
    """The sites' rows, the validation set and the test set."""

    sites: dict[Count, str | list[str]] = Field(
        min_length=1,
        description="By number of sites: a folder that holds so many site files and no other *.yaml, which may have "
        "{alpha} in its name; or a list of site files.",
    )
    validation: DataConfig = Field(description="Rows by which the learning rate is selected.")
    test: DataConfig = Field(
        description="Rows for the final scores, after the learning rate is selected; used for nothing else."
    )
    label: str | None = Field(
        None, description="Column whose values per site the report counts; a classifier's default is its answer."
    )


class ClaimConfig(Section):
    """A claim that one strategy is better than others, tested over the seeds of each setting."""

    better: str = Field(description="The strategy's name in the comparison.")
    than: list[str] = Field(min_length=1, description="Names of the others, each compared with it.")


class ExperimentConfig(Section):
    """An experiment: a federation, its data, and a grid."""

    name: Name = Field(description="Results go to runs/<name>.")
    federation: dict[str, Any] = Field(description="The sections of a federation file that all runs share.")
    data: ExperimentData
    grid: GridConfig
    select_by: str = Field(
        "loss",
        description="Score by which the learning rate is selected: on the validation set, after the last round.",
        json_schema_extra=lambda schema: schema.update(enum=[*_selectable()]),
    )
    score_at: Literal["last", "best"] = Field(
        "last",
        description="Round whose state is scored. `last`: the last one. `best`: the one that has the best `select_by` "
        "on the validation set with the selected learning rate, among those that are evaluated.",
    )
    claims: list[ClaimConfig] = Field(
        [], description="Claims that the comparison tests by `select_by`, with a paired t-test over the seeds."
    )
    scales: dict[Name, dict[str, Any]] = Field(
        {}, description="Variants by name: sections of this file, of which they replace single keys."
    )

    @field_validator("select_by")
    @classmethod
    def _picks(cls, name: str) -> str:
        if name not in _selectable():
            raise ValueError(f"{name!r} picks no learning rate; allowed: {', '.join(_selectable())}")
        return name

    @field_validator("federation")
    @classmethod
    def _leaves_the_grid_alone(cls, federation: dict[str, Any]) -> dict[str, Any]:
        for key, instead in _DECIDED.items():
            section, _, leaf = key.rpartition(".")
            within = federation.get(section) if section else federation
            if isinstance(within, Mapping) and leaf in within:
                raise ValueError(f"`{key}` is decided by the experiment; give {instead}")
        return federation

    @model_validator(mode="after")
    def _claims_name_strategies(self) -> Self:
        known = {choice.called for choice in self.grid.strategies}
        for claim in self.claims:
            for name in (claim.better, *claim.than):
                if name not in known:
                    raise ValueError(f"`claims` names {name!r}; strategies of the grid: {', '.join(sorted(known))}")
        return self


def _selectable() -> list[str]:
    return [name for name, score in SCORES.items() if score.selectable]


def load_experiment(source: Path, scale: str | None) -> ExperimentConfig:
    """Read an experiment file, in one of its scales.

    Raises:
        ConfigError: names the file, key, value and what is allowed.
    """
    config = load(source, ExperimentConfig)
    if scale is None:
        return config
    if scale not in config.scales:
        raise ConfigError(f"{source}: there is no scale {scale!r}; allowed: {', '.join(config.scales) or 'none'}")
    plain = yaml.safe_load(source.read_text(encoding="utf-8"))
    return parse(_merged(plain, config.scales[scale]), ExperimentConfig, f"{source}, scale {scale}")


def _merged(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged, anything else is replaced."""
    merged = dict(plain)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(plain.get(key), Mapping)
        merged[key] = _merged(plain[key], value) if both else value
    return merged


def _refuse_twice(values: list[Any], hint: str = "") -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value} appears twice{hint}")
