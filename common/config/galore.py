"""The keys of strategies under which sites train base weights in a projection of their gradients."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.config.traits import HEAD, Head, StrategySection

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
        "float32", description="Number format of factors on the wire; float32 is exact, the others' error is reported."
    )
    downlink_rank: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="With `subspace` own: most directions of a weight's mean change that a round sends down; the rest "
        "waits at the server for later rounds. `auto`: as many as the round's largest update has. null: all.",
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
        if self.downlink_rank is not None and (self.subspace, self.projection) != ("own", "galore"):
            told = (
                f"`downlink_rank` {self.downlink_rank} with `subspace` {self.subspace}, `projection` {self.projection}"
            )
            raise ValueError(f"{told}, whose way down is small already or never; allowed with it: own, galore")
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

    @property
    def publishes_later(self) -> bool:
        """See ``StrategySection.publishes_later``."""
        return self.downlink_rank is not None

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

    def moments_wanted(self) -> dict[str, str]:
        """See ``StrategySection.moments_wanted``; a kept basis has its use without moments, too."""
        kept = self.optimizer_state == "averaged" or (self.optimizer_state, self.projection) == ("keep", "none")
        wanted: dict[str, str] = {"optimizer_state": self.optimizer_state} if kept else {}
        return wanted if self.moments == "float32" else wanted | {"moments": self.moments}

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
