"""The federation file, which the operator writes: typed, strict, and published as a JSON schema.

Unknown keys, wrong types and impossible combinations are refused by ``common.config.load.load`` with file, key, value
and what is allowed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.config.aggregation import AggregationConfig, KrumConfig, MeanConfig, MultiKrumConfig, ServerOptimizerConfig
from common.config.section import DataConfig, Digest, ModelSource, Name, Section, resolve
from common.config.strategy import StrategyConfig
from common.config.task import CausalLMTask, ClassificationTask, TaskConfig
from common.config.training import TrainingConfig
from common.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
#: Sections that may be given by one word: the key that the word stands for.
_ONE_WORD = {"strategy": "name", "task": "type", "aggregation": "method", "server_optimizer": "method"}
_NOTHING_TO_EVALUATE = "so that the server has no model of its own to evaluate; leave `evaluation.server` out"


class ModelConfig(ModelSource):
    """Which base model all sites start from. Give ``path`` or ``hub``; without either every site names its own copy."""

    dtype: Dtype = Field("float32", description="Type of the weights in memory; what travels of them is float32.")
    digest: Digest | None = Field(
        None,
        description="SHA-256 of the weights in `dtype`, as `fedspan server invite` finds it; no others are trained.",
    )
    tokenizer_digest: Digest | None = Field(None, description="The same of the tokenizer, or of the image processor.")

    def _may_lack_source(self) -> bool:
        """As a site is sent it, and as an invitation has it, which knows the model by its digest alone."""
        return self.path is None and self.hub is None

    def difference(self, digest: str, tokenizer_digest: str) -> str | None:
        """What of a base model that was loaded is not as this section says, in words; None when all is.

        Args:
            digest: of its weights, hex.
            tokenizer_digest: of its tokenizer, hex.
        """
        pairs = {"base model": (digest, self.digest), "tokenizer": (tokenizer_digest, self.tokenizer_digest)}
        for what, (found, wanted) in pairs.items():
            if wanted is not None and found != wanted:
                return f"the {what} differs: digest {found}, the federation file's is {wanted}"
        return None


class CohortConfig(Section):
    """Who takes part in a round, and how long it may take."""

    min_clients: int = Field(2, ge=1, description="A round needs this many valid updates.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the connected clients sampled each round.")
    join_deadline: float = Field(300.0, gt=0, description="Seconds to wait for `min_clients` to connect.")
    round_deadline: float = Field(3600.0, gt=0, description="Seconds a round may take.")
    deadline_factor: float | None = Field(
        None,
        gt=1,
        description="With `min_clients` updates a round closes earlier: after this many times what the slowest site of "
        "the last 5 rounds took, at least 10 seconds. null: it waits for all until `round_deadline`.",
    )


class AdmissionConfig(Section):
    """Which updates are believed, beyond those that are well formed and possible."""

    norm_ratio: float | None = Field(
        10.0,
        gt=1,
        description="An update may move this many times as far as the median one of its round, of three or more. "
        "null: no such bound; updates are then combined as they arrive, without a stop on disk.",
    )
    max_noise: float = Field(
        0.0,
        ge=0,
        description="Largest noise that a site may add for differential privacy, standard deviation per number; what "
        "its update may move grows by it. 0: a site that adds noise is not admitted.",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="Most training rows that a site may declare, which are its weight in the average; one that "
        "declares more is not admitted. null: no limit.",
    )
    max_refusals: int = Field(3, ge=1, description="A site refused so often in a row is left out until readmitted.")


class EvaluationConfig(Section):
    """What is measured, on held-out rows, at every site and on the server's own set."""

    every: int = Field(
        1, ge=1, description="Rounds between two evaluations; before the first and after the last always."
    )
    max_examples: int = Field(
        64, ge=1, description="Held-out rows that are scored; of a longer set the same ones each time."
    )
    generate: int = Field(
        16, ge=0, description="Held-out rows answered by generation for ROUGE-L, BLEU-4, exact match."
    )
    max_new_tokens: int = Field(48, ge=1, description="Length limit of a generated answer, tokens.")
    batch_size: int = Field(16, ge=1, description="Rows in one evaluation pass.")
    samples: int = Field(8, ge=0, description="Of the server's own set: questions shown with answers before and after.")
    server: DataConfig | None = Field(None, description="The server's own evaluation set; none: sites only.")


class CheckpointConfig(Section):
    """What is kept to go on from when the server dies."""

    every: int = Field(1, ge=1, description="Rounds between two checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept; each is as large as the federation's tensors.")


class LocalConfig(Section):
    """Only for ``fedspan run``: the sites to start on this machine."""

    sites: list[str] = Field(min_length=1, description="Site files, relative to this file.")
    warm: bool = Field(
        True, description="Keep a worker process per site between messages; false: a new process for every message."
    )


class FederationConfig(Section):
    """One federation: model, task, strategy, rounds, cohort, local training, evaluation."""

    name: Name = Field(description="Results go to runs/<name>.")
    model: ModelConfig
    task: TaskConfig = Field(CausalLMTask(), description="What is learned: `causal-lm`, or a section.")
    strategy: StrategyConfig
    aggregation: AggregationConfig = Field(MeanConfig(), description="How the server combines a round's updates.")
    server_optimizer: ServerOptimizerConfig | None = Field(
        None, description="How the server goes along the combined change; `none`: as far as it goes."
    )
    rounds: int = Field(ge=1, description="Training rounds.")
    cohort: CohortConfig = CohortConfig()
    admission: AdmissionConfig = AdmissionConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    local: LocalConfig | None = None

    @field_validator(*_ONE_WORD, mode="before")
    @classmethod
    def _one_word(cls, value: object, info: ValidationInfo) -> object:
        """``strategy: rolora`` is short for ``strategy: {name: rolora}``; ``server_optimizer: none`` is none."""
        if info.field_name == "server_optimizer" and value == "none":
            return None
        return {_ONE_WORD[str(info.field_name)]: value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for reason in _contradictions(self):
            raise ValueError(reason)
        return self


def resolved(federation: FederationConfig, source: Path) -> FederationConfig:
    """The same federation with its paths made absolute, relative to the folder of the file it was read from."""
    data = federation.model_dump(mode="json")
    if federation.model.path is not None:
        data["model"]["path"] = str(resolve(federation.model.path, source))
    if federation.evaluation.server is not None:
        data["evaluation"]["server"]["path"] = str(resolve(federation.evaluation.server.path, source))
    if federation.local is not None:
        data["local"]["sites"] = [str(resolve(site, source)) for site in federation.local.sites]
    return FederationConfig.model_validate(data)


def check_source(federation: FederationConfig, source: Path) -> None:
    """Raise a ConfigError when a federation file, ``source``, does not say where the server finds the base model."""
    if federation.model.path is None and federation.model.hub is None:
        raise ConfigError(f"{source}: missing key `model.path` or `model.hub`; the server needs the base model itself")


def settings_for_sites(federation: FederationConfig) -> str:
    """What of the federation file every site receives and has agreed to, as JSON.

    Left out is what concerns the server alone, and where it keeps the base model. The digests of that are left to
    whom it may concern: a site compares its copy with those in the file that it has received, the server with its own.
    """
    settings = federation.model_dump(mode="json")
    for key in ("local", "checkpoint", "admission", "aggregation", "server_optimizer"):
        del settings[key]
    settings["cohort"] = {"min_clients": federation.cohort.min_clients}
    del settings["evaluation"]["server"], settings["evaluation"]["samples"]
    for key in ("path", "digest", "tokenizer_digest"):
        del settings["model"][key]
    return json.dumps(settings)


def as_invited(federation: FederationConfig, digest: str, tokenizer_digest: str) -> FederationConfig:
    """The federation as a site is told of it beforehand: no path of the operator's machine, the model by its digests.

    Args:
        federation: the operator's.
        digest: of the base model, hex.
        tokenizer_digest: of its tokenizer, hex.
    """
    data = json.loads(settings_for_sites(federation))
    data["model"] |= {"digest": digest, "tokenizer_digest": tokenizer_digest}
    return FederationConfig.model_validate_json(json.dumps(data))


def _contradictions(federation: FederationConfig) -> Iterator[str]:
    """What is impossible in a federation file, each in a sentence that names the keys and what is allowed."""
    yield from _aggregation(federation)
    yield from _server_model(federation)
    yield from _averaged_moments(federation)
    yield from _head(federation)


def _aggregation(federation: FederationConfig) -> Iterator[str]:
    strategy, method, optimizer = federation.strategy, federation.aggregation, federation.server_optimizer
    if strategy.plain_mean_only is not None and method != MeanConfig():
        yield (
            f"`strategy` {strategy.name} {strategy.plain_mean_only}; allowed with it: `aggregation` mean without "
            "`clip_norm`"
        )
    if not strategy.takes_server_optimizer and optimizer is not None:
        yield (
            f"`strategy` {strategy.name} does not average what it trains, so that `server_optimizer` "
            f"{optimizer.method} has no change to go on with; allowed with it: none"
        )
    if isinstance(method, KrumConfig | MultiKrumConfig):
        needed, clients = 2 * method.byzantine + 3, federation.cohort.min_clients
        if clients < needed:
            yield (
                f"`cohort.min_clients` is {clients}; `aggregation` {method.method} with `byzantine` "
                f"{method.byzantine} needs at least {needed}"
            )


def _server_model(federation: FederationConfig) -> Iterator[str]:
    strategy = federation.strategy
    if strategy.stays_at_site is not None and federation.evaluation.server is not None:
        yield f"`strategy` {strategy.name} keeps every {strategy.stays_at_site} at its site, {_NOTHING_TO_EVALUATE}"


def _averaged_moments(federation: FederationConfig) -> Iterator[str]:
    if federation.strategy.optimizer_state != "averaged":
        return
    if federation.training.optimizer != "adamw":
        yield (
            "`strategy.optimizer_state` is averaged, but `training.optimizer` "
            f"{federation.training.optimizer} has no second moments; allowed with it: adamw"
        )
    if federation.server_optimizer is not None:
        yield (
            "`strategy.optimizer_state` is averaged, and second moments are no weights that "
            f"`server_optimizer` {federation.server_optimizer.method} could move; allowed with it: none"
        )


def _head(federation: FederationConfig) -> Iterator[str]:
    classifies, head = isinstance(federation.task, ClassificationTask), federation.strategy.head
    if classifies and head is None:
        yield "missing key `strategy.head`: what becomes of the classifier's head; train, freeze or local"
    if head is not None and not classifies:
        yield f"`strategy.head` is {head!r}, but `task` {federation.task.type} has no classification head"
    if head == "local" and federation.evaluation.server is not None:
        yield f"`strategy.head` local keeps every trained head at its site, {_NOTHING_TO_EVALUATE}"
