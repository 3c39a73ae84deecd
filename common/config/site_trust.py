"""The part of a site file that says whose code may run at the site."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from common.config.section import Section

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TrustConfig(Section):
    """An app bundle runs here when it is listed, or signed with one of the keys."""

    keys: list[str] = Field([], description="Public keys of who vouches for code (`python -m deploy.keys.bundle key`).")
    bundles: list[Digest] = Field([], description="SHA-256 of single bundles (`python -m deploy.keys.bundle digest`).")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.keys and not self.bundles:
            raise ValueError("give `keys` or `bundles`; with neither, no bundle could run")
        return self
