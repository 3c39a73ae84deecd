"""The sections of a federation file that choose a method: the strategy, how updates are combined, the server's step."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Head = Literal["train", "freeze", "local"]
_HEAD = (
    "Classification head, to be given with such a task: `train` (whole, and averaged), `freeze` (as the base model has "
    "it, or as it was drawn), or `local` (trained and kept at the site)."
)


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Selection(Section):
    """Which tensors are trained (arXiv 2410.23111: the MLPs of a range of lower blocks)."""

    modules: str | list[str] = Field(
        "mlp",
        description="`mlp`, `attention`, `linear` (both), or a list of module names such as [up_proj, down_proj].",
    )
    blocks: str = Field(
        "lower third",
        description="`all`, `lower third`, `lower half`, `lower quarter`, `lower N`, `0-9`, or `0,2,5`.",
    )


class FedFTGConfig(Selection):
    """FedFTG (arXiv 2410.23111): GaLore at the sites, direct averaging at the server."""

    name: Literal["fedftg"] = "fedftg"
    rank: int = Field(16, ge=1, description="Rank of the GaLore projection.")
    subspace: Literal["own", "shared"] = Field(
        "own",
        description="`own`: every site's basis comes from its gradients. `shared`: one random basis per weight and "
        "round, the same at all sites, which does not travel.",
    )
    update_proj_gap: int | None = Field(
        None, ge=1, description="Steps between two refreshes of an own basis; null: 200. Not with `shared`."
    )
    refresh_batches: int = Field(
        1, ge=1, description="Batches whose mean gradient gives an own basis; more than 1 cost as many passes more."
    )
    scale: float = Field(0.25, gt=0, description="GaLore's scale of the projected update.")
    moments: Literal["float32", "8bit"] = Field(
        "float32", description="How Adam's moments are kept; `8bit` needs bitsandbytes at the sites."
    )
    wire_precision: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="Of the factors on the wire; float32 is exact, the others' error is reported."
    )
    optimizer_state: Literal["reset", "averaged"] = Field(
        "reset",
        description="Between rounds. `averaged`: the server averages the sites' second moments of Adam, and the next "
        "round begins with them (after arXiv 2602.01746); needs `subspace` shared and `moments` float32.",
    )
    head: Head | None = Field(None, description=_HEAD)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.subspace == "shared" and (self.update_proj_gap is not None or self.refresh_batches != 1):
            raise ValueError("`subspace` shared takes no `update_proj_gap` and no `refresh_batches`; leave them out")
        if self.optimizer_state == "averaged" and (self.subspace != "shared" or self.moments != "float32"):
            raise ValueError(
                f"`optimizer_state` averaged with `subspace` {self.subspace} and `moments` {self.moments}; allowed "
                "with it: shared, whose moments can be compared, and float32"
            )
        return self


class LoraConfig(Selection):
    """What all LoRA strategies share."""

    blocks: str = Field("all", description=Selection.model_fields["blocks"].description)
    modules: str | list[str] = Field("attention", description=Selection.model_fields["modules"].description)
    rank: int = Field(8, ge=1, description="LoRA rank; a site file may cap it where the strategy allows mixed ranks.")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA alpha; the scaling is lora_alpha / rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    rslora: bool = Field(False, description="Scaling lora_alpha / sqrt(rank) instead.")
    head: Head | None = Field(None, description=_HEAD)
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="Optimizer moments between rounds.")
    merge: bool = Field(False, description="Also export the base model with the adapter merged in, as `merged/`.")


class FlexLoRAConfig(LoraConfig):
    """FlexLoRA (arXiv 2402.11505): average B A, split again by truncated SVD; ranks may differ."""

    name: Literal["flexlora"] = "flexlora"
    split: Literal["left", "sqrt"] = Field("left", description="B = U S (left) or B = U sqrt(S) (sqrt).")
    optimizer_state: Literal["reset"] = Field("reset", description="Moments are invalid after re-factorisation.")


class FFALoRAConfig(LoraConfig):
    """FFA-LoRA (arXiv 2403.12313): A frozen and shared, only B trained and averaged."""

    name: Literal["ffa-lora"] = "ffa-lora"


class RoLoRAConfig(LoraConfig):
    """RoLoRA (arXiv 2502.01755): B and A trained and averaged in alternate rounds."""

    name: Literal["rolora"] = "rolora"
    optimizer_state: Literal["reset"] = Field("reset", description="Each phase trains other tensors.")


class FedITConfig(LoraConfig):
    """FedIT (arXiv 2305.05644): A and B averaged separately; inexact, the baseline everyone compares with."""

    name: Literal["fedit"] = "fedit"


class FedSALoRAConfig(LoraConfig):
    """FedSA-LoRA (arXiv 2410.01463): A averaged, B trained and kept at the site."""

    name: Literal["fedsa-lora"] = "fedsa-lora"
    merge: Literal[False] = Field(False, description="There is no B outside the sites.")


class MergingLoraConfig(LoraConfig):
    """What LoRA strategies share that change the base weights, too."""

    merge: Literal[True] = Field(True, description="`model/` is the whole model, since its base weights change.")


class FedExLoRAConfig(MergingLoraConfig):
    """FedEx-LoRA (arXiv 2410.09432): A and B averaged separately, what that loses added to the base weights."""

    name: Literal["fedex-lora"] = "fedex-lora"


class FLoRAConfig(MergingLoraConfig):
    """FLoRA (arXiv 2409.05976): all sites' B A added to the base weights, a fresh A and B in every round."""

    name: Literal["flora"] = "flora"
    optimizer_state: Literal["reset"] = Field("reset", description="Every round trains fresh factors.")


StrategyConfig = Annotated[
    FedFTGConfig
    | FlexLoRAConfig
    | FFALoRAConfig
    | RoLoRAConfig
    | FedITConfig
    | FedSALoRAConfig
    | FedExLoRAConfig
    | FLoRAConfig,
    Field(discriminator="name"),
]


class _Clipping(Section):
    """Ways to combine updates that may be clipped first."""

    clip_norm: float | None = Field(
        None, gt=0, description="Longest change of a site, in medians of the round's norms; null: not clipped."
    )


class MeanConfig(_Clipping):
    """The mean, weighted by examples."""

    method: Literal["mean"] = "mean"


class TrimmedMeanConfig(_Clipping):
    """Coordinate-wise trimmed mean (arXiv 1803.01498), unweighted."""

    method: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(gt=0, lt=0.5, description="Share of the updates left out at either end, rounded down.")


class MedianConfig(_Clipping):
    """Coordinate-wise median (arXiv 1803.01498), unweighted."""

    method: Literal["median"] = "median"


class _KrumConfig(Section):
    """What Krum and multi-Krum share."""

    byzantine: int = Field(
        ge=0,
        description="f: how many sites may send anything; a round needs 2 f + 3 updates, `cohort.min_clients` too.",
    )


class KrumConfig(_KrumConfig):
    """The one update nearest to its neighbors (arXiv 1703.02757)."""

    method: Literal["krum"] = "krum"


class MultiKrumConfig(_KrumConfig):
    """The mean, weighted by examples, of all but the f updates farthest from their neighbors (arXiv 1703.02757)."""

    method: Literal["multi-krum"] = "multi-krum"


AggregationConfig = Annotated[
    MeanConfig | TrimmedMeanConfig | MedianConfig | KrumConfig | MultiKrumConfig, Field(discriminator="method")
]


class FedAvgMConfig(Section):
    """Momentum over the rounds' averaged changes (arXiv 1909.06335)."""

    method: Literal["fedavgm"] = "fedavgm"
    learning_rate: float = Field(1.0, gt=0, description="Of the server; 1 without momentum is plain averaging.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Share of the last rounds' step that is kept.")


class FedAdamConfig(Section):
    """Adam over the rounds' averaged changes (arXiv 2003.00295, algorithm 2)."""

    method: Literal["fedadam"] = "fedadam"
    learning_rate: float = Field(gt=0, description="Of the server: about how far a coordinate moves in a round.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of the changes.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the mean of their squares.")
    tau: float = Field(1e-3, gt=0, description="Adaptivity: changes much smaller than this are not scaled up.")


ServerOptimizerConfig = Annotated[FedAvgMConfig | FedAdamConfig, Field(discriminator="method")]
