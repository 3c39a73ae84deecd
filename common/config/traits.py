"""Traits of strategies: the facts that code outside a rule may ask for; and the keys of all LoRA strategies."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from common.config.section import Section

if TYPE_CHECKING:
    from common.protocol.factors import Exchange

Head = Literal["train", "freeze", "local"]
HEAD = (
    "How the classification head is treated; required with a classification task: `train` (trained in full, and "
    "averaged), `freeze` (kept as in the base model, or as drawn at random), or `local` (trained, kept at the site)."
)


class Selection(Section):
    """Choice of the trained tensors (arXiv 2410.23111: the MLPs of a range of lower blocks)."""

    modules: str | list[str] = Field(
        "mlp",
        description="`mlp`, `attention`, `linear` (both), or a list of module names such as [up_proj, down_proj].",
    )
    blocks: str = Field(
        "lower third",
        description="`all`, `lower third`, `lower half`, `lower quarter`, `lower N`, `0-9`, or `0,2,5`.",
    )


class StrategySection(Selection):
    """Base of all strategies' sections: the traits, and the form in which factors are sent.

    Attributes:
        title: the strategy's name in reports.
        source: the strategy's paper.
        trains: the trained tensors: base weights or LoRA adapters.
        changes_base: the strategy changes base weights. Then the state is float32, and the server sends a round's
            change as a step in factors.
        fresh_factors: every round starts with B = 0 and a new A, drawn by ``common.model.adapters.fresh_a``.
        stays_at_site: the LoRA factor that a site trains and keeps; None: the site sends all trained tensors.
        splits_anew: the server factors the mean product B A again in every round; the rows of A are then orthonormal.
        mixed_ranks: LoRA ranks may differ between sites.
        private: a site with differential privacy may take part, because the site sends nothing but the update.
        plain_mean_only: the reason why ``aggregation`` must be the plain mean; None: any aggregation is allowed.
        needs_updates: the reason why the server must see single updates, so that masked sums are not possible; None: a
            weighted sum of the updates is enough (see ``single_updates_needed``).
        needs_current: the reason why every update of a round must start from the same state, so that slow sites cannot
            be left to go on; None: a change counts beside a later state, too (see ``current_needed``).
        takes_server_optimizer: a round's change of the state is a mean of changes, so a server optimizer can take it
            as a gradient.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    trains: ClassVar[Literal["weights", "lora"]]
    changes_base: ClassVar[bool] = False
    fresh_factors: ClassVar[bool] = False
    stays_at_site: ClassVar[Literal["A", "B"] | None] = None
    splits_anew: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    private: ClassVar[bool] = False
    plain_mean_only: ClassVar[str | None] = None
    needs_updates: ClassVar[str | None] = "does not say that a sum is enough"
    needs_current: ClassVar[str | None] = "does not say that a change counts beside a later state"
    takes_server_optimizer: ClassVar[bool] = True

    @property
    def shares_basis(self) -> bool:
        """Whether the changes of all sites lie in one random subspace per weight and round."""
        return False

    @property
    def publishes_later(self) -> bool:
        """Whether a part of a round's change may wait at the server and come in any later round."""
        return False

    def projects(self, name: str) -> bool:
        """Whether sites train a base weight of this name in a projection of its gradient."""
        del name
        return False

    def single_updates_needed(self) -> str | None:
        """The reason why these settings need single updates at the server, for the end of a sentence; None: none."""
        return self.needs_updates

    def current_needed(self) -> str | None:
        """The reason why these settings need updates of the current state, for the end of a sentence; None: none."""
        return self.needs_current

    def moments_wanted(self) -> dict[str, str]:
        """The keys that say something about Adam's moments alone, with their values."""
        return {}

    def exchange(self, seed: int, server_round: int) -> "Exchange":
        """The form in which a round's factors are sent, the same at the server and at every site.

        Args:
            seed: the federation's seed.
            server_round: the round, from 1.
        """
        from common.protocol.factors import Exchange

        return Exchange()


class LoraConfig(StrategySection):
    """Keys of all LoRA strategies."""

    trains: ClassVar[Literal["lora"]] = "lora"

    blocks: str = Field("all", description=Selection.model_fields["blocks"].description)
    modules: str | list[str] = Field("attention", description=Selection.model_fields["modules"].description)
    rank: int = Field(8, ge=1, description="LoRA rank; a site file may cap it where the strategy allows mixed ranks.")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA alpha; the scaling is lora_alpha / rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    rslora: bool = Field(False, description="true: the scaling is lora_alpha / sqrt(rank).")
    head: Head | None = Field(None, description=HEAD)
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="Optimizer moments between rounds.")
    merge: bool = Field(False, description="Also export the base model with the adapter merged in, as `merged/`.")
    name: str

    def moments_wanted(self) -> dict[str, str]:
        """See ``StrategySection.moments_wanted``."""
        return {} if self.optimizer_state == "reset" else {"optimizer_state": self.optimizer_state}


class MergingLoraConfig(LoraConfig):
    """Keys of the LoRA strategies that change the base weights, too."""

    changes_base: ClassVar = True

    merge: Literal[True] = Field(
        True, description="Always true: the export is a complete model, because the base weights change."
    )
