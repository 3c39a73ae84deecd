"""The section of a federation file that chooses the strategy: options and traits of each strategy.

A strategy is defined in two places: its section here, with options and traits, and its rule in ``strategies/``. Server
and sites read the traits, so that no other code asks for a strategy's name.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from common.config.traits import HEAD, Head, LoraConfig, MergingLoraConfig, StrategySection

if TYPE_CHECKING:
    from common.protocol.factors import Exchange

_GAP = 200  # optimizer steps; the default of GaLore's authors


class GaLoreConfig(StrategySection):
    """Keys of all strategies under which sites train base weights with GaLore."""

    trains: ClassVar[Literal["weights"]] = "weights"
    changes_base: ClassVar = True

    name: str
    projection: Literal["galore", "none"] = Field(
        "galore",
        description="`galore`: gradients are projected, and changes are sent in low-rank factors. `none`: the weights "
        "are trained and sent whole, as the reference that GaLore is compared with; `rank` has no meaning then.",
    )
    rank: int = Field(16, ge=1, description="Rank of the GaLore projection.")
    subspace: Literal["own", "shared"] = Field(
        "own",
        description="`own`: every site computes its bases from its own gradients. `shared`: one random basis per "
        "weight and round, drawn from the seed at all sites and never sent.",
    )
    update_proj_gap: int = Field(
        _GAP, ge=1, description="Optimizer steps between two refreshes of an own basis; null: 200. Not with `shared`."
    )
    refresh_batches: int = Field(
        1,
        ge=1,
        description="Batches whose mean gradient gives an own basis; each batch beyond the first costs one more "
        "forward and backward pass. Not with `shared`.",
    )
    scale: float = Field(0.25, gt=0, description="GaLore's scale of the projected update.")
    moments: Literal["float32", "8bit"] = Field(
        "float32", description="Number format of Adam's moments; `8bit` needs bitsandbytes at the sites."
    )
    wire_precision: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="Number format of the factors on the wire; float32 is exact, the error of the others is reported.",
    )
    optimizer_state: Literal["reset", "keep", "averaged"] = Field(
        "reset",
        description="Adam's moments between rounds. `reset`: every round starts with zeros. `keep`: every site goes on "
        "with its moments and its basis, which is refreshed every `update_proj_gap` steps of the run; needs `subspace` "
        "own. `averaged`: the server averages the sites' second moments, and the next round starts with the average "
        "(after arXiv 2602.01746); needs `subspace` shared and `moments` float32.",
    )
    head: Head | None = Field(None, description=HEAD)

    @field_validator("update_proj_gap", mode="before", json_schema_input_type=Annotated[int, Field(ge=1)] | None)
    @classmethod
    def _null_is_the_default(cls, value: object) -> object:
        return _GAP if value is None else value

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.projection == "none" and (self.subspace, self.scale, self.wire_precision) != ("own", 0.25, "float32"):
            raise ValueError(
                "`projection` none takes no `subspace`, `scale` and `wire_precision`: nothing is projected and sent in "
                "factors; leave them out"
            )
        if self.projection == "none" and (self.update_proj_gap != _GAP or self.refresh_batches != 1):
            raise ValueError("`projection` none takes no `update_proj_gap` and no `refresh_batches`; leave them out")
        if self.subspace == "shared" and (self.update_proj_gap != _GAP or self.refresh_batches != 1):
            raise ValueError("`subspace` shared takes no `update_proj_gap` and no `refresh_batches`; leave them out")
        if self.optimizer_state == "averaged" and (self.subspace != "shared" or self.moments != "float32"):
            raise ValueError(
                f"`optimizer_state` averaged with `subspace` {self.subspace} and `moments` {self.moments}; allowed "
                "with it: shared, whose moments can be compared, and float32"
            )
        if self.optimizer_state == "keep" and self.subspace == "shared":
            raise ValueError(
                "`optimizer_state` keep with `subspace` shared, whose bases are new in every round; allowed with it: "
                "reset and averaged"
            )
        return self

    def projects(self, name: str) -> bool:
        """See ``StrategySection.projects``; a classification head is trained whole."""
        from common.model.families import in_head

        return self.projection == "galore" and not in_head(name)

    @property
    def shares_basis(self) -> bool:
        """See ``StrategySection.shares_basis``."""
        return self.subspace == "shared"

    def single_updates_needed(self) -> str | None:
        """See ``StrategySection.single_updates_needed``."""
        if self.projection == "none":
            return "with `projection` none sends whole weights; allowed with it: `subspace` shared"
        if not self.shares_basis:
            return "with `subspace` own has other bases at every site; allowed with it: `subspace` shared"
        if self.optimizer_state == "averaged":
            return "with `optimizer_state` averaged sends second moments, which have no bound; allowed with it: reset"
        if self.wire_precision != "float32":
            return f"with `wire_precision` {self.wire_precision} rounds every update; allowed with it: float32"
        return self.needs_updates

    def current_needed(self) -> str | None:
        """See ``StrategySection.current_needed``."""
        if self.optimizer_state == "averaged":
            return (
                "with `optimizer_state` averaged has second moments, which a change could make negative beside later"
                " ones; allowed with it: reset"
            )
        return self.needs_current

    def bases(self, steps: int) -> int:
        """Most bases that a site uses in a round of ``steps`` optimizer steps."""
        if self.shares_basis:
            return 1
        # A kept basis may be refreshed within the round: a round begins at a multiple of what both numbers share.
        late = self.update_proj_gap - math.gcd(steps, self.update_proj_gap) if self.optimizer_state == "keep" else 0
        return math.ceil((late + steps) / self.update_proj_gap)

    def shared(self, seed: int) -> tuple[int, int] | None:
        """Seed and rank from which all sites draw the shared bases; None: each site has its own bases."""
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
    needs_updates: ClassVar = None
    needs_current: ClassVar = None

    name: Literal["fedftg"] = "fedftg"


class FlexLoRAConfig(LoraConfig):
    """FlexLoRA (arXiv 2402.11505): average the products B A, factor the average by truncated SVD; ranks may differ."""

    title: ClassVar = "FlexLoRA"
    source: ClassVar = "arXiv 2402.11505"
    private: ClassVar = True
    splits_anew: ClassVar = True
    mixed_ranks: ClassVar = True
    plain_mean_only: ClassVar = "averages products"
    takes_server_optimizer: ClassVar = False  # each round's SVD gives new bases: factors of two rounds do not subtract
    needs_updates: ClassVar = "averages the products B A of every site"
    needs_current: ClassVar = None

    name: Literal["flexlora"] = "flexlora"
    optimizer_state: Literal["reset"] = Field("reset", description="Moments are invalid after re-factorisation.")


class FFALoRAConfig(LoraConfig):
    """FFA-LoRA (arXiv 2403.12313): A frozen and shared, only B trained and averaged."""

    title: ClassVar = "FFA-LoRA"
    source: ClassVar = "arXiv 2403.12313"
    private: ClassVar = True
    needs_updates: ClassVar = None
    needs_current: ClassVar = None

    name: Literal["ffa-lora"] = "ffa-lora"


class FedSVDConfig(LoraConfig):
    """FedSVD (arXiv 2505.12805): only B trained and averaged; A drawn anew from the SVD of B A after every round."""

    title: ClassVar = "FedSVD"
    source: ClassVar = "arXiv 2505.12805"
    private: ClassVar = True
    splits_anew: ClassVar = True
    needs_updates: ClassVar = None
    needs_current: ClassVar = "draws A anew after every round, and a change of B counts beside its own A alone"
    takes_server_optimizer: ClassVar = False  # each round's SVD gives new bases: factors of two rounds do not subtract

    name: Literal["fedsvd"] = "fedsvd"
    optimizer_state: Literal["reset"] = Field("reset", description="Moments are invalid after re-factorisation.")


class RoLoRAConfig(LoraConfig):
    """RoLoRA (arXiv 2502.01755): B and A trained and averaged in alternate rounds."""

    title: ClassVar = "RoLoRA"
    source: ClassVar = "arXiv 2502.01755"
    private: ClassVar = True
    needs_updates: ClassVar = None
    needs_current: ClassVar = (
        "trains B and A in turn, and a change of one counts beside its own state of the other alone"
    )

    name: Literal["rolora"] = "rolora"
    optimizer_state: Literal["reset"] = Field("reset", description="Each phase trains other tensors.")


class FedITConfig(LoraConfig):
    """FedIT (arXiv 2305.05644): A and B averaged separately; inexact, the baseline everyone compares with."""

    title: ClassVar = "FedIT"
    source: ClassVar = "arXiv 2305.05644"
    private: ClassVar = True
    needs_updates: ClassVar = None
    needs_current: ClassVar = None

    name: Literal["fedit"] = "fedit"


class FedSALoRAConfig(LoraConfig):
    """FedSA-LoRA (arXiv 2410.01463): A averaged, B trained and kept at the site."""

    title: ClassVar = "FedSA-LoRA"
    source: ClassVar = "arXiv 2410.01463"
    stays_at_site: ClassVar = "B"
    needs_updates: ClassVar = None
    needs_current: ClassVar = None

    name: Literal["fedsa-lora"] = "fedsa-lora"
    merge: Literal[False] = Field(False, description="There is no B outside the sites.")


class FedExLoRAConfig(MergingLoraConfig):
    """FedEx-LoRA (arXiv 2410.09432): A and B averaged separately, the averages' error added to the base weights."""

    title: ClassVar = "FedEx-LoRA"
    source: ClassVar = "arXiv 2410.09432"
    plain_mean_only: ClassVar = "adds to the base weights what the means lose"
    takes_server_optimizer: ClassVar = False  # the residual is exact only beside the plain means of A and B
    needs_updates: ClassVar = "adds the products B A of every site to the base weights"
    needs_current: ClassVar = "corrects the means of A and B, which takes sites that start from the same A and B"

    name: Literal["fedex-lora"] = "fedex-lora"


class FLoRAConfig(MergingLoraConfig):
    """FLoRA (arXiv 2409.05976): the sites' products B A added to the base weights, a new A and B in every round."""

    title: ClassVar = "FLoRA"
    source: ClassVar = "arXiv 2409.05976"
    fresh_factors: ClassVar = True
    mixed_ranks: ClassVar = True
    takes_server_optimizer: ClassVar = False  # A and B are reset in every round
    needs_updates: ClassVar = "stacks the factors of every site"
    needs_current: ClassVar = None

    name: Literal["flora"] = "flora"
    optimizer_state: Literal["reset"] = Field("reset", description="Every round trains a new A and B.")


StrategyConfig = Annotated[
    FedFTGConfig
    | FlexLoRAConfig
    | FFALoRAConfig
    | FedSVDConfig
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
    """Names of the strategies with a trait, e.g. ``names(lambda section: section.private)``; default: all."""
    return [name_of(section) for section in SECTIONS if trait(section)]


def title_of(name: str) -> str:
    """A strategy's title for reports; a name of no strategy, such as an experiment's label, is returned unchanged."""
    return next((section.title for section in SECTIONS if name_of(section) == name), name)
