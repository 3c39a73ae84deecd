"""The section of a federation file that chooses the strategy: options and traits of each strategy.

A strategy is defined in two places: its section here, with options and traits, and its rule in ``strategies/``. Server
and sites read the traits, so that no other code asks for a strategy's name.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from common.config.galore import GaLoreConfig
from common.config.traits import LoraConfig, MergingLoraConfig, StrategySection


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
