"""What a strategy is, as far as the rest of FedSpan has to know: the traits of its section."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from common.config.section import Section

if TYPE_CHECKING:
    from common.protocol.factors import Exchange


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


class StrategySection(Selection):
    """What all strategies' sections share: the traits, and how weights travel.

    Attributes:
        title: what a report calls the strategy.
        source: the paper that it follows.
        trains: what the sites train, base weights or LoRA adapters.
        changes_base: base weights change. They are federated in float32, and a round's change of them is a step that
            travels in factors.
        fresh_factors: A and B start anew in every round, drawn by ``common.model.adapters.fresh_a``.
        stays_at_site: the LoRA factor that a site trains and keeps; None: all that is trained leaves.
        mixed_ranks: LoRA ranks may differ between sites.
        private: a site with differential privacy may take part, because the update is all that it sends.
        plain_mean_only: why the strategy takes no ``aggregation`` but the plain mean; None: it takes any.
        takes_server_optimizer: the state's change in a round is a mean of changes, which a server optimizer can go on
            with.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    trains: ClassVar[Literal["weights", "lora"]]
    changes_base: ClassVar[bool] = False
    fresh_factors: ClassVar[bool] = False
    stays_at_site: ClassVar[Literal["A", "B"] | None] = None
    mixed_ranks: ClassVar[bool] = False
    private: ClassVar[bool] = False
    plain_mean_only: ClassVar[str | None] = None
    takes_server_optimizer: ClassVar[bool] = True

    @property
    def shares_basis(self) -> bool:
        """Whether the changes of all sites lie in one random subspace per weight and round."""
        return False

    def exchange(self, seed: int, server_round: int) -> "Exchange":
        """How changes of base weights travel in factors in a round, for the server and for every site.

        Args:
            seed: of the federation.
            server_round: from 1.
        """
        from common.protocol.factors import Exchange

        return Exchange()
