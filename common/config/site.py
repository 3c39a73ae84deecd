"""The site file: written by the hospital, beside its data."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.section import Name, Section, SiteDataConfig
from common.config.site_policy import PolicyConfig as PolicyConfig, PrivacyConfig as PrivacyConfig, check_site

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TrustConfig(Section):
    """An app bundle runs here when it is listed, or signed with one of the keys."""

    keys: list[str] = Field([], description="Public keys of who vouches for code (`fedspan code key`).")
    bundles: list[Digest] = Field([], description="SHA-256 of single bundles (`fedspan code digest`).")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.keys and not self.bundles:
            raise ValueError("give `keys` or `bundles`; with neither, no bundle could run")
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
