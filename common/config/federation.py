"""The federation file and the site file: typed, strict, and published as JSON schemas.

The operator writes one federation file; every hospital writes one site file beside its data. Unknown keys, wrong
types and impossible combinations are refused by ``common.config.load.load`` with file, key, value and what is allowed.
"""

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.config.site_policy import PolicyConfig as PolicyConfig, PrivacyConfig as PrivacyConfig, check_site
from common.config.site_trust import TrustConfig as TrustConfig
from common.config.strategy import (
    AggregationConfig as AggregationConfig,
    FedAdamConfig as FedAdamConfig,
    FedAvgMConfig as FedAvgMConfig,
    FedExLoRAConfig as FedExLoRAConfig,
    FedFTGConfig as FedFTGConfig,
    FedITConfig as FedITConfig,
    FedSALoRAConfig as FedSALoRAConfig,
    FFALoRAConfig as FFALoRAConfig,
    FlexLoRAConfig as FlexLoRAConfig,
    FLoRAConfig as FLoRAConfig,
    KrumConfig as KrumConfig,
    LoraConfig as LoraConfig,
    MeanConfig as MeanConfig,
    MedianConfig as MedianConfig,
    MergingLoraConfig as MergingLoraConfig,
    MultiKrumConfig as MultiKrumConfig,
    RoLoRAConfig as RoLoRAConfig,
    Section as Section,
    Selection as Selection,
    ServerOptimizerConfig as ServerOptimizerConfig,
    StrategyConfig as StrategyConfig,
    TrimmedMeanConfig as TrimmedMeanConfig,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Dtype = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """Which base model all sites start from. Give ``path`` or ``hub``."""

    path: str | None = Field(None, description="Folder with a Hugging Face model, relative to this file.")
    hub: str | None = Field(None, description="Hugging Face hub id, e.g. HuggingFaceTB/SmolLM2-135M-Instruct.")
    revision: str | None = Field(None, description="Commit of the hub model; required with `hub`.")
    dtype: Dtype = Field("float32", description="Type of the weights in memory; what travels of them is float32.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` and `hub`")
        if self.hub is not None and self.revision is None:
            raise ValueError("`revision` (a commit of the hub model) is required with `hub`")
        return self


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


class TrainingConfig(Section):
    """Local training. Give ``local_steps`` or ``local_epochs``."""

    #: Of Adam, at all clients: no knob, because admission derives from them how far a step can go.
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="For FedFTG this runs inside the projection.")
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Over all rounds of the run.")
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the whole run spent in linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradient clipping; null for none.")
    batch_size: int = Field(8, ge=1, description="Rows in one forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    local_steps: int | None = Field(None, ge=1, description="Optimizer steps per round.")
    local_epochs: int | None = Field(None, ge=1, description="Passes over the shard per round.")
    max_length: int = Field(512, ge=8, description="Tokens per row; longer rows are cut.")
    gradient_checkpointing: bool = Field(False, description="Trade time for memory.")
    seed: int = Field(0, ge=0, description="Seed of batch order, LoRA initialisation and sampling.")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of `local_steps` and `local_epochs`")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation

    def steps(self, rows: int) -> int:
        """Optimizer steps of a round at a client that trains on so many rows."""
        return self.local_steps or math.ceil(rows / self.rows_per_step) * (self.local_epochs or 1)


class DataConfig(Section):
    """Where rows are, and how a row becomes a prompt and an answer."""

    path: str = Field(
        description="JSONL, CSV or Parquet file, a folder saved by `datasets`, or one of images with a sub-folder per "
        "label; relative to this file."
    )
    format: Literal["auto", "jsonl", "csv", "parquet", "dataset", "image-folder"] = Field(
        "auto", description="auto: by the ending, or by what a folder holds."
    )
    prompt: str = Field(
        description="Column name, or a template with columns in braces: 'Term: {term}'. Of images: the column with the "
        "file's path, relative to the table; `image` in an image folder."
    )
    answer: str = Field(
        description="Column name or template of the answer, the only text the loss counts. Of a classification: the "
        "label's column; `label` in an image folder."
    )
    system: str | None = Field(None, description="System message, where the chat template has one.")
    skip_unreadable: bool = Field(
        False, description="Images only: leave out, and count, those that cannot be read; false: refuse the shard."
    )


class SiteDataConfig(DataConfig):
    """A site's shard: rows for training and rows held out."""

    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the rows kept for evaluation, chosen by content.")


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
    """Only for ``python -m deploy.local``: the sites to start on this machine."""

    sites: list[str] = Field(min_length=1, description="Site files, relative to this file.")
    warm: bool = Field(
        True, description="Keep a worker process per site between messages; false: a new process for every message."
    )


class CausalLMTask(Section):
    """Prompt in, answer out."""

    type: Literal["causal-lm"] = "causal-lm"


class ClassificationTask(Section):
    """What classifications share: one of ``labels`` comes out; a head that the base model lacks is new."""

    labels: list[str] = Field(min_length=2, description="All labels, the same at every site, in a fixed order.")

    @field_validator("labels")
    @classmethod
    def _unique(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError("`labels` has the same label twice")
        return labels


class SequenceClassificationTask(ClassificationTask):
    """A text in, a label out."""

    type: Literal["sequence-classification"] = "sequence-classification"


class ImageClassificationTask(ClassificationTask):
    """An image in, a label out."""

    type: Literal["image-classification"] = "image-classification"


TaskConfig = Annotated[CausalLMTask | SequenceClassificationTask | ImageClassificationTask, Field(discriminator="type")]


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

    @field_validator("strategy", mode="before")
    @classmethod
    def _one_word(cls, value: object) -> object:
        """``strategy: rolora`` is short for ``strategy: {name: rolora}``."""
        return {"name": value} if isinstance(value, str) else value

    @field_validator("task", mode="before")
    @classmethod
    def _one_word_task(cls, value: object) -> object:
        """``task: causal-lm`` is short for ``task: {type: causal-lm}``."""
        return {"type": value} if isinstance(value, str) else value

    @field_validator("aggregation", mode="before")
    @classmethod
    def _one_word_aggregation(cls, value: object) -> object:
        """``aggregation: median`` is short for ``aggregation: {method: median}``."""
        return {"method": value} if isinstance(value, str) else value

    @field_validator("server_optimizer", mode="before")
    @classmethod
    def _one_word_optimizer(cls, value: object) -> object:
        """``server_optimizer: fedavgm`` is short for ``server_optimizer: {method: fedavgm}``; `none` is none."""
        return None if value == "none" else {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_aggregate(self) -> Self:
        if isinstance(self.strategy, FlexLoRAConfig | FedExLoRAConfig) and self.aggregation != MeanConfig():
            why = {"flexlora": "averages products", "fedex-lora": "adds to the base weights what the means lose"}
            name = self.strategy.name
            raise ValueError(f"`strategy` {name} {why[name]}; allowed with it: `aggregation` mean without `clip_norm`")
        if isinstance(self.strategy, FlexLoRAConfig | MergingLoraConfig) and self.server_optimizer is not None:
            raise ValueError(
                f"`strategy` {self.strategy.name} does not average what it trains, so that `server_optimizer` "
                f"{self.server_optimizer.method} has no change to go on with; allowed with it: none"
            )
        if isinstance(self.aggregation, KrumConfig | MultiKrumConfig):
            needed = 2 * self.aggregation.byzantine + 3
            if self.cohort.min_clients < needed:
                raise ValueError(
                    f"`cohort.min_clients` is {self.cohort.min_clients}; `aggregation` {self.aggregation.method} with "
                    f"`byzantine` {self.aggregation.byzantine} needs at least {needed}"
                )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if isinstance(self.strategy, FedSALoRAConfig) and self.evaluation.server is not None:
            raise ValueError(
                "`strategy` fedsa-lora keeps every B at its site, so that the server has no model of its own to "
                "evaluate; leave `evaluation.server` out"
            )
        if self.strategy.optimizer_state == "averaged":
            if self.training.optimizer != "adamw":
                raise ValueError(
                    "`strategy.optimizer_state` is averaged, but `training.optimizer` "
                    f"{self.training.optimizer} has no second moments; allowed with it: adamw"
                )
            if self.server_optimizer is not None:
                raise ValueError(
                    "`strategy.optimizer_state` is averaged, and second moments are no weights that "
                    f"`server_optimizer` {self.server_optimizer.method} could move; allowed with it: none"
                )
        classifies, head = isinstance(self.task, ClassificationTask), self.strategy.head
        if classifies and head is None:
            raise ValueError(
                "missing key `strategy.head`: what becomes of the classifier's head; train, freeze or local"
            )
        if head is not None and not classifies:
            raise ValueError(f"`strategy.head` is {head!r}, but `task` {self.task.type} has no classification head")
        if head == "local" and self.evaluation.server is not None:
            raise ValueError(
                "`strategy.head` local keeps every trained head at its site, so that the server has no model of its "
                "own to evaluate; leave `evaluation.server` out"
            )
        return self


class SiteConfig(Section):
    """One site: its name, its private shard, its device."""

    name: Name = Field(description="The site's name, as the operator sees it.")
    data: SiteDataConfig
    model: str | None = Field(None, description="This site's copy of the base model; default: the federation's path.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: CUDA when present.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of forward and backward; auto: bfloat16 on CUDA that has it, else float32.",
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="Cap on rows per forward pass; accumulation makes it up."
    )
    max_rank: int | None = Field(None, ge=1, description="Cap on the LoRA rank, where the strategy allows mixed ranks.")
    trust: TrustConfig | None = Field(None, description="Whose code may run here; null: any that the operator sends.")
    policy: PolicyConfig = PolicyConfig()
    privacy: PrivacyConfig | None = None
    ledger: str | None = Field(
        None, description="Record of all that leaves, relative to this file; default: <name>-ledger.jsonl beside it."
    )

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        check_site(self.policy, self.privacy, self.precision)
        return self

    @property
    def shares_metrics(self) -> bool:
        """Whether losses and held-out scores leave."""
        return self.privacy is None and self.policy.share_metrics is not False


def resolve(path: str, beside: Path) -> Path:
    """``path`` as written in the file ``beside``: absolute, or relative to that file's folder."""
    return (beside.parent / Path(path).expanduser()).resolve()


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


def settings_for_sites(federation: FederationConfig) -> str:
    """What of the federation file every site receives, as JSON: all but what concerns only the server's machine."""
    return federation.model_dump_json(
        exclude={
            "local": True,
            "checkpoint": True,
            "admission": True,
            "aggregation": True,
            "server_optimizer": True,
            "evaluation": {"server": True},
        }
    )
