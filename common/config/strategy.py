"""The section of a federation file that chooses the strategy, and what each strategy is: its traits.

A strategy is told in two places: its section here, with its options and traits, and its rule in ``strategies/``. Both
sides of a federation read the traits, so that nothing else has to know a strategy by its name.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from common.config.traits import Selection, StrategySection

if TYPE_CHECKING:
    from common.protocol.factors import Exchange

Head = Literal["train", "freeze", "local"]
_GAP = 200  # steps, as GaLore's authors have it
_HEAD = (
    "Classification head, to be given with such a task: `train` (whole, and averaged), `freeze` (as the base model has "
    "it, or as it was drawn), or `local` (trained and kept at the site)."
)


class GaLoreConfig(StrategySection):
    """What strategies share whose sites train base weights with GaLore."""

    trains: ClassVar[Literal["weights"]] = "weights"
    changes_base: ClassVar = True

    name: str
    rank: int = Field(16, ge=1, description="Rank of the GaLore projection.")
    subspace: Literal["own", "shared"] = Field(
        "own",
        description="`own`: every site's basis comes from its gradients. `shared`: one random basis per weight and "
        "round, the same at all sites, which does not travel.",
    )
    update_proj_gap: int = Field(
        _GAP, ge=1, description="Steps between two refreshes of an own basis; null: 200. Not with `shared`."
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

    @field_validator("update_proj_gap", mode="before", json_schema_input_type=Annotated[int, Field(ge=1)] | None)
    @classmethod
    def _null_is_the_default(cls, value: object) -> object:
        return _GAP if value is None else value

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.subspace == "shared" and (self.update_proj_gap != _GAP or self.refresh_batches != 1):
            raise ValueError("`subspace` shared takes no `update_proj_gap` and no `refresh_batches`; leave them out")
        if self.optimizer_state == "averaged" and (self.subspace != "shared" or self.moments != "float32"):
            raise ValueError(
                f"`optimizer_state` averaged with `subspace` {self.subspace} and `moments` {self.moments}; allowed "
                "with it: shared, whose moments can be compared, and float32"
            )
        return self

    @property
    def shares_basis(self) -> bool:
        """See ``StrategySection.shares_basis``."""
        return self.subspace == "shared"

    def bases(self, steps: int) -> int:
        """How many bases a site uses in a round of so many optimizer steps."""
        return 1 if self.shares_basis else math.ceil(steps / self.update_proj_gap)

    def shared(self, seed: int) -> tuple[int, int] | None:
        """What all sites draw the same bases from, the federation's seed and their rank; None: bases are their own."""
        return (seed, self.rank) if self.shares_basis else None

    def exchange(self, seed: int, server_round: int) -> "Exchange":
        """See ``StrategySection.exchange``."""
        from common.protocol.factors import Exchange

        return Exchange.of_round(server_round, self.wire_precision, self.shared(seed))


class FedFTGConfig(GaLoreConfig):
    """FedFTG (arXiv 2410.23111): GaLore at the sites, direct averaging at the server."""

    title: ClassVar = "FedFTG"
    source: ClassVar = "arXiv 2410.23111"
    private: ClassVar = True

    name: Literal["fedftg"] = "fedftg"


class LoraConfig(StrategySection):
    """What all LoRA strategies share."""

    trains: ClassVar[Literal["lora"]] = "lora"

    blocks: str = Field("all", description=Selection.model_fields["blocks"].description)
    modules: str | list[str] = Field("attention", description=Selection.model_fields["modules"].description)
    rank: int = Field(8, ge=1, description="LoRA rank; a site file may cap it where the strategy allows mixed ranks.")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA alpha; the scaling is lora_alpha / rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    rslora: bool = Field(False, description="Scaling lora_alpha / sqrt(rank) instead.")
    head: Head | None = Field(None, description=_HEAD)
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="Optimizer moments between rounds.")
    merge: bool = Field(False, description="Also export the base model with the adapter merged in, as `merged/`.")
    name: str


class FlexLoRAConfig(LoraConfig):
    """FlexLoRA (arXiv 2402.11505): average B A, split again by truncated SVD; ranks may differ."""

    title: ClassVar = "FlexLoRA"
    source: ClassVar = "arXiv 2402.11505"
    private: ClassVar = True
    mixed_ranks: ClassVar = True
    plain_mean_only: ClassVar = "averages products"
    takes_server_optimizer: ClassVar = False  # the factors turn when the average is split anew

    name: Literal["flexlora"] = "flexlora"
    optimizer_state: Literal["reset"] = Field("reset", description="Moments are invalid after re-factorisation.")


class FFALoRAConfig(LoraConfig):
    """FFA-LoRA (arXiv 2403.12313): A frozen and shared, only B trained and averaged."""

    title: ClassVar = "FFA-LoRA"
    source: ClassVar = "arXiv 2403.12313"
    private: ClassVar = True

    name: Literal["ffa-lora"] = "ffa-lora"


class RoLoRAConfig(LoraConfig):
    """RoLoRA (arXiv 2502.01755): B and A trained and averaged in alternate rounds."""

    title: ClassVar = "RoLoRA"
    source: ClassVar = "arXiv 2502.01755"
    private: ClassVar = True

    name: Literal["rolora"] = "rolora"
    optimizer_state: Literal["reset"] = Field("reset", description="Each phase trains other tensors.")


class FedITConfig(LoraConfig):
    """FedIT (arXiv 2305.05644): A and B averaged separately; inexact, the baseline everyone compares with."""

    title: ClassVar = "FedIT"
    source: ClassVar = "arXiv 2305.05644"
    private: ClassVar = True

    name: Literal["fedit"] = "fedit"


class FedSALoRAConfig(LoraConfig):
    """FedSA-LoRA (arXiv 2410.01463): A averaged, B trained and kept at the site."""

    title: ClassVar = "FedSA-LoRA"
    source: ClassVar = "arXiv 2410.01463"
    stays_at_site: ClassVar = "B"

    name: Literal["fedsa-lora"] = "fedsa-lora"
    merge: Literal[False] = Field(False, description="There is no B outside the sites.")


class MergingLoraConfig(LoraConfig):
    """What LoRA strategies share that change the base weights, too."""

    changes_base: ClassVar = True

    merge: Literal[True] = Field(True, description="`model/` is the whole model, since its base weights change.")


class FedExLoRAConfig(MergingLoraConfig):
    """FedEx-LoRA (arXiv 2410.09432): A and B averaged separately, what that loses added to the base weights."""

    title: ClassVar = "FedEx-LoRA"
    source: ClassVar = "arXiv 2410.09432"
    plain_mean_only: ClassVar = "adds to the base weights what the means lose"
    takes_server_optimizer: ClassVar = False  # what the base weights take belongs to the means themselves

    name: Literal["fedex-lora"] = "fedex-lora"


class FLoRAConfig(MergingLoraConfig):
    """FLoRA (arXiv 2409.05976): all sites' B A added to the base weights, a fresh A and B in every round."""

    title: ClassVar = "FLoRA"
    source: ClassVar = "arXiv 2409.05976"
    fresh_factors: ClassVar = True
    mixed_ranks: ClassVar = True
    takes_server_optimizer: ClassVar = False  # the factors start anew

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

SECTIONS: tuple[type[StrategySection], ...] = get_args(get_args(StrategyConfig)[0])


def name_of(section: type[StrategySection]) -> str:
    """The name by which a federation file chooses a strategy."""
    return str(section.model_fields["name"].default)


def names(trait: Callable[[type[StrategySection]], bool] = lambda section: True) -> list[str]:
    """Names of the strategies that have a trait, e.g. ``names(lambda section: section.private)``; default: of all."""
    return [name_of(section) for section in SECTIONS if trait(section)]


def title_of(name: str) -> str:
    """What a report calls a strategy; a word that names none, such as a label of an experiment, stays as it is."""
    return next((section.title for section in SECTIONS if name_of(section) == name), name)
