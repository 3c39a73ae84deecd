"""Parts that the sections of several files share: base class, names, paths, model source, data source."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # a federation, run or site; also a valid file name
SERVER = "server"  # the server's own name in records and pages; no site may have this name
Name = Annotated[str, Field(pattern=NAME)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSource(Section):
    """Source of a base model. Give ``path`` or ``hub``."""

    path: str | None = Field(None, description="Folder with a Hugging Face model, relative to this file.")
    hub: str | None = Field(None, description="Hugging Face hub id, e.g. HuggingFaceTB/SmolLM2-135M-Instruct.")
    revision: str | None = Field(None, description="Commit of the hub model; required with `hub`.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None) and not self._may_lack_source():
            raise ValueError("give exactly one of `path` and `hub`")
        if self.hub is not None and self.revision is None:
            raise ValueError("`revision` (a commit of the hub model) is required with `hub`")
        return self

    def _may_lack_source(self) -> bool:
        return False


class DataConfig(Section):
    """Source of rows, and how a row becomes a prompt and an answer."""

    path: str = Field(
        description="JSONL, CSV or Parquet file, a folder saved by `datasets`, or a folder of images with one "
        "sub-folder per label; relative to this file."
    )
    format: Literal["auto", "jsonl", "csv", "parquet", "dataset", "image-folder"] = Field(
        "auto", description="auto: by the file's ending, or by the folder's files."
    )
    prompt: str = Field(
        description="Column name, or a template with columns in braces: 'Term: {term}'. For images: the column with "
        "the file's path, relative to the table; `image` in an image folder."
    )
    answer: str = Field(
        description="Column name or template of the answer, the only text the loss counts. For classification: the "
        "label's column; `label` in an image folder."
    )
    system: str | None = Field(None, description="System message, where the chat template has one.")
    skip_unreadable: bool = Field(
        False, description="Images only. true: unreadable images are left out and counted; false: the shard is refused."
    )


class SiteDataConfig(DataConfig):
    """A site's shard: rows for training and rows held out."""

    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the rows kept for evaluation, chosen by content.")


def resolve(path: str, beside: Path) -> Path:
    """``path`` as written in the file ``beside``: absolute, or relative to that file's folder."""
    return (beside.parent / Path(path).expanduser()).resolve()
