"""The federation file, which the operator writes: typed, strict, and published as a JSON schema.

``common.config.load.load`` rejects unknown keys, wrong types and impossible combinations; the error names file, key,
value and the allowed values.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.config.aggregation import AggregationConfig, KrumConfig, MeanConfig, MultiKrumConfig, ServerOptimizerConfig
from common.config.cohort import (
    AdmissionConfig,
    CohortConfig,
    SecureAggregationConfig,
    single_updates_needed,
    waiting_needed,
)
from common.config.outcome import BestConfig, CheckpointConfig, DeliveryConfig, checkpoints_needed, measured
from common.config.section import DataConfig, Digest, ModelSource, Name, Quantization, Section, resolve
from common.config.strategy import StrategyConfig
from common.config.task import CausalLMTask, ClassificationTask, TaskConfig, task_fits
from common.config.tracking import TrackingConfig
from common.config.training import TrainingConfig
from common.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
#: Sections that may be written as one word, with the key that the word is the value of.
_ONE_WORD = {"strategy": "name", "task": "type", "aggregation": "method", "server_optimizer": "method"}
_NOTHING_TO_EVALUATE = "so that the server has no model of its own to evaluate; leave `evaluation.server` out"


class ModelConfig(ModelSource):
    """Base model that all sites start from. Give ``path`` or ``hub``; without either every site names its own copy."""

    dtype: Dtype = Field("float32", description="Type of the weights in memory; weights are sent as float32.")
    digest: Digest | None = Field(
        None,
        description="SHA-256 of the weights in `dtype`, as `fedspan server invite` computes it; a site with other "
        "weights does not take part.",
    )
    tokenizer_digest: Digest | None = Field(None, description="SHA-256 of the tokenizer, or of the image processor.")
    quantization: Quantization = Field(
        "whole",
        description="How server and sites hold linear weights that nobody trains: `whole`, "
        "`nf4` (4 bit, needs bitsandbytes) or `int8`. Digests and finished models are of whole weights.",
    )
    site_quantization: list[Quantization] = Field(
        [], description="Forms that a site file may choose instead, by its own `quantization`."
    )

    def _may_lack_source(self) -> bool:
        """Settings for sites and invitations have neither path nor hub: they name the model by its digest."""
        return self.path is None and self.hub is None

    def difference(self, digest: str, tokenizer_digest: str) -> str | None:
        """The difference, in words, between a loaded base model and the digests of this section; None: no difference.

        Args:
            digest: digest of the loaded weights, hex.
            tokenizer_digest: digest of the loaded tokenizer, hex.
        """
        pairs = {"base model": (digest, self.digest), "tokenizer": (tokenizer_digest, self.tokenizer_digest)}
        for what, (found, wanted) in pairs.items():
            if wanted is not None and found != wanted:
                return f"the {what} differs: digest {found}, the federation file's is {wanted}"
        return None


class EvaluationConfig(Section):
    """Evaluation on held-out rows, at every site and on the server's own set."""

    every: int = Field(
        1,
        ge=1,
        description="Rounds between two evaluations; there is always one before the first round and one after the "
        "last.",
    )
    max_examples: int = Field(
        64, ge=1, description="Most held-out rows that are scored; from a longer set the same rows each time."
    )
    generate: int = Field(
        16, ge=0, description="Held-out rows answered by generation for ROUGE-L, BLEU-4, exact match."
    )
    max_new_tokens: int = Field(48, ge=1, description="Length limit of a generated answer, tokens.")
    batch_size: int = Field(16, ge=1, description="Rows in one evaluation pass.")
    samples: int = Field(
        8,
        ge=0,
        description="Questions from the server's own set that the report shows, with the answers before and after "
        "training.",
    )
    server: DataConfig | None = Field(None, description="The server's own evaluation set; null: sites evaluate only.")


class LocalConfig(Section):
    """Only for ``fedspan run``: the sites to start on this machine."""

    sites: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="Site files, relative to this file."
    )
    warm: bool = Field(
        True,
        description="Each site keeps a worker process between messages; false: a new process for every message.",
    )


class FederationConfig(Section):
    """One federation: model, task, strategy, rounds, cohort, local training, evaluation."""

    name: Name = Field(description="Results go to runs/<name>.")
    model: ModelConfig
    task: TaskConfig = Field(CausalLMTask(), description="Learning task: `causal-lm`, or a section.")
    strategy: StrategyConfig
    aggregation: AggregationConfig = Field(MeanConfig(), description="How the server aggregates a round's updates.")
    server_optimizer: ServerOptimizerConfig | None = Field(
        None,
        description="Optimizer that the server applies to the averaged update, with the average as its gradient; "
        "`none`: apply the average directly, as FedAvg does.",
    )
    rounds: int = Field(ge=1, description="Training rounds.")
    cohort: CohortConfig = CohortConfig()
    admission: AdmissionConfig = AdmissionConfig()
    secure_aggregation: SecureAggregationConfig | None = Field(
        None, description="Nobody, the server included, sees a single site's update; null: the server sees them all."
    )
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    best: BestConfig = BestConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    tracking: TrackingConfig | None = Field(None, description="Trackers that the server feeds beside TensorBoard.")
    local: LocalConfig | None = None

    @property
    def shared_noise(self) -> float:
        """Standard deviation of the noise that every site adds to its part of a masked sum; 0: none."""
        return 0.0 if self.secure_aggregation is None else self.secure_aggregation.noise

    @field_validator(*_ONE_WORD, mode="before")
    @classmethod
    def _one_word(cls, value: object, info: ValidationInfo) -> object:
        """``strategy: rolora`` is short for ``strategy: {name: rolora}``; ``server_optimizer: none`` is none."""
        if info.field_name == "server_optimizer" and value == "none":
            return None
        return {_ONE_WORD[str(info.field_name)]: value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _masked(cls, data: Any) -> Any:  # noqa: ANN401 - whatever a file holds
        """With masked sums the default of ``admission.norm_ratio`` is null: the server sees no single update's norm."""
        if not isinstance(data, dict) or data.get("secure_aggregation") is None:
            return data
        admission = data.get("admission", {})
        return data | ({"admission": {"norm_ratio": None} | admission} if isinstance(admission, dict) else {})

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for reason in _contradictions(self):
            raise ValueError(reason)
        self.deciding_scores()
        return self

    def deciding_scores(self) -> list[str]:
        """The scores that may decide about the best round, the task's default first; see ``outcome.measured``."""
        classifies = isinstance(self.task, ClassificationTask)
        return measured(self.best, classifies=classifies, generates=self.evaluation.generate > 0)


def resolved(federation: FederationConfig, source: Path) -> FederationConfig:
    """A copy of ``federation`` with absolute paths; ``source`` is the file that relative paths refer to."""
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
    """The settings of a federation that the server sends to every site and that sites agree to, as JSON.

    The settings leave out the sections that concern the server alone, and the base model's path and digests. Each side
    compares its base model with the digests of its own federation file: a site with those of the file that it was
    invited with, the server with those of the operator's file (decision 027). The settings include all keys that bound
    a round's change of the state, because a site accepts no larger change (``client.reach``).
    """
    settings = federation.model_dump(mode="json")
    for key in ("local", "checkpoint", "aggregation", "best", "delivery", "tracking"):
        del settings[key]
    settings["admission"] = {key: settings["admission"][key] for key in ("max_noise", "max_rows")}
    settings["cohort"] = {"min_clients": federation.cohort.min_clients}
    if federation.secure_aggregation is not None:
        settings["secure_aggregation"] = {key: settings["secure_aggregation"][key] for key in ("threshold", "noise")}
    else:
        del settings["secure_aggregation"]  # agreements of before the key stay good
    del settings["evaluation"]["server"], settings["evaluation"]["samples"]
    for key in ("path", "digest", "tokenizer_digest"):
        del settings["model"][key]
    for key in ("quantization", "site_quantization"):  # agreements of before the keys stay good
        if settings["model"][key] == ModelConfig.model_fields[key].default:
            del settings["model"][key]
    return json.dumps(settings)


def as_invited(federation: FederationConfig, digest: str, tokenizer_digest: str) -> FederationConfig:
    """The federation file for an invitation: without paths of the operator's machine, the model by its digests.

    Args:
        federation: the operator's federation file.
        digest: digest of the base model, hex.
        tokenizer_digest: digest of the base model's tokenizer, hex.
    """
    data = json.loads(settings_for_sites(federation))
    data["model"] |= {"digest": digest, "tokenizer_digest": tokenizer_digest}
    return FederationConfig.model_validate_json(json.dumps(data))


def _contradictions(federation: FederationConfig) -> Iterator[str]:
    """The contradictions in a federation file, one sentence each; a sentence names the keys and the allowed values."""
    yield from _aggregation(federation)
    yield from _server_model(federation)
    yield from _moments(federation)
    yield from task_fits(federation.task, federation.strategy, federation.training)
    yield from checkpoints_needed(federation.checkpoint, federation.strategy)
    yield from _secure(federation)
    yield from waiting_needed(federation.cohort, federation.strategy, federation.secure_aggregation)


def _secure(federation: FederationConfig) -> Iterator[str]:
    if (secure := federation.secure_aggregation) is None:
        return
    strategy, admission, cohort = federation.strategy, federation.admission, federation.cohort
    yield from single_updates_needed(secure, strategy, federation.training, federation.aggregation, admission, cohort)
    if federation.local is not None and not federation.local.warm:
        yield "`secure_aggregation` keeps a round's keys in a site's worker, and `local.warm` false has none"


def _aggregation(federation: FederationConfig) -> Iterator[str]:
    strategy, method, optimizer = federation.strategy, federation.aggregation, federation.server_optimizer
    if strategy.plain_mean_only is not None and method != MeanConfig():
        yield (
            f"`strategy` {strategy.name} {strategy.plain_mean_only}; allowed with it: `aggregation` mean without "
            "`clip_norm`, weighted by rows"
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
    if federation.evaluation.server is None:
        return
    if strategy.stays_at_site is not None:
        yield f"`strategy` {strategy.name} keeps every {strategy.stays_at_site} at its site, {_NOTHING_TO_EVALUATE}"
    if strategy.head == "local":
        yield f"`strategy.head` local keeps every trained head at its site, {_NOTHING_TO_EVALUATE}"


def _moments(federation: FederationConfig) -> Iterator[str]:
    strategy, training = federation.strategy, federation.training
    for key, about in strategy.moments_wanted().items() if training.optimizer != "adamw" else ():
        yield (
            f"`strategy.{key}` is {about}, but `training.optimizer` {training.optimizer} has no moments; allowed with "
            "it: adamw"
        )
    if strategy.optimizer_state == "averaged" and federation.server_optimizer is not None:
        yield (
            "`strategy.optimizer_state` is averaged, and second moments are no weights that "
            f"`server_optimizer` {federation.server_optimizer.method} could move; allowed with it: none"
        )
