"""What the sections of several files share: their base, names, paths, and where rows are."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a federation, run or site: fit for a file's
SERVER = "server"  # in records and pages the server's own name, so no site's
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(Section):
    """Where rows are, and how a row becomes a prompt and an answer."""

    path: str = Field(
        description="JSONL, CSV or Parquet file, a folder saved by `datasets`, or one of images with a sub-folder per "
        "label; relative to this file."
    )
    format: Literal["auto", "jsonl", "csv", "parquet", "dataset", "image-folder"] = Field(
        "auto", description="auto: by the ending, or by what a folder holds."
    )
    prompt: str = Field(
        description="Column name, or a template with columns in braces: 'Term: {term}'. Of images: the column with the "
        "file's path, relative to the table; `image` in an image folder."
    )
    answer: str = Field(
        description="Column name or template of the answer, the only text the loss counts. Of a classification: the "
        "label's column; `label` in an image folder."
    )
    system: str | None = Field(None, description="System message, where the chat template has one.")
    skip_unreadable: bool = Field(
        False, description="Images only: leave out, and count, those that cannot be read; false: refuse the shard."
    )


class SiteDataConfig(DataConfig):
    """A site's shard: rows for training and rows held out."""

    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the rows kept for evaluation, chosen by content.")


def resolve(path: str, beside: Path) -> Path:
    """``path`` as written in the file ``beside``: absolute, or relative to that file's folder."""
    return (beside.parent / Path(path).expanduser()).resolve()
