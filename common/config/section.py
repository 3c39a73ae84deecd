"""Parts that the sections of several files share: base class, names, paths, model source, data source, digest."""

import codecs
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # a federation, run or site; also a valid file name
SERVER = "server"  # the server's own name in records and pages; no site may have this name
Name = Annotated[str, Field(pattern=NAME)]
Quantization = Literal["whole", "nf4", "int8"]  # forms of a weight in memory
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256


class Section(BaseModel):
    """Base of all sections: strict types, finite numbers, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSource(Section):
    """Source of a base model. Give ``path`` or ``hub``."""

    path: str | None = Field(None, min_length=1, description="Folder with a Hugging Face model, relative to this file.")
    hub: str | None = Field(
        None, min_length=1, description="Hugging Face hub id, e.g. HuggingFaceTB/SmolLM2-135M-Instruct."
    )
    revision: str | None = Field(None, min_length=1, description="Commit of the hub model; required with `hub`.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None) and not self._may_lack_source():
            raise ValueError("give exactly one of `path` and `hub`")
        if self.hub is not None and self.revision is None:
            raise ValueError("`revision` (a commit of the hub model) is required with `hub`")
        return self

    def _may_lack_source(self) -> bool:
        return False


class TableConfig(Section):
    """Where rows are, and how they are read."""

    path: str = Field(
        min_length=1,
        description="JSONL, CSV, Excel (.xlsx) or Parquet file, a folder of such, a folder saved by `datasets`, or one "
        "of images with a sub-folder per label; relative to this file.",
    )
    format: Literal["auto", "jsonl", "csv", "xlsx", "parquet", "dataset", "image-folder"] = Field(
        "auto", description="auto: by the ending, or by what a folder holds."
    )
    split: str | None = Field(
        None, description="Split of a folder with several: `train`, `test`, as in the files' names."
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character between cells of CSV; null: detected, and shown by `site check`.",
    )
    encoding: str | None = Field(
        None,
        description="Encoding of CSV and JSONL, by Python's name: utf-8, cp1252, latin-1; null: detected, and shown "
        "by `site check`.",
    )
    sheet: str | None = Field(None, description="Sheet of an Excel workbook; null: the one that has the columns.")

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        try:
            return None if encoding is None else codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"{encoding!r} is no encoding; allowed: utf-8, cp1252, latin-1, mac-roman, ...") from None


class DataConfig(TableConfig):
    """Where rows are, and how a row becomes a prompt and an answer."""

    prompt: str = Field(
        "",
        description="Column name, or a template with columns in braces: 'Term: {term}'; `a.b` is b in a nested column "
        "a. For images: the column with the file's path, relative to the table; `image` in an image folder.",
    )
    answer: str = Field(
        "",
        description="Column name or template of the answer, the only text the loss counts. For classification: the "
        "label's column; `label` in an image folder.",
    )
    messages: str | None = Field(
        None,
        description="In place of `prompt` and `answer`: the column with a conversation, a list of `role` and "
        "`content`. The loss counts every assistant turn; turns of tools are left out.",
    )
    system: str | None = Field(
        None, description="System message, where the chat template has one, and the row none of its own."
    )
    skip_empty: bool = Field(
        False, description="Leave out, and count, rows in which a wanted cell is empty; false: refuse the shard."
    )
    skip_unreadable: bool = Field(
        False, description="Images only. true: unreadable images are left out and counted; false: the shard is refused."
    )

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> Self:
        if bool(self.messages) == bool(self.prompt or self.answer) or bool(self.prompt) != bool(self.answer):
            raise ValueError("give `prompt` and `answer`, or `messages` alone")
        return self


class SiteDataConfig(DataConfig):
    """A site's shard: rows for training and rows held out."""

    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the rows kept for evaluation, chosen by content.")


def resolve(path: str, beside: Path) -> Path:
    """``path`` as written in ``beside``: absolute, or relative to that file's folder; a link keeps its own name."""
    full = beside.parent / Path(path).expanduser()
    return full.resolve() if full.name in ("", "..") else full.parent.resolve() / full.name


def canonical(settings: object) -> str:
    """Settings as JSON text, the same text for the same settings.

    Raises:
        ValueError: they hold a number that is not finite.
    """
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


def settings_digest(settings: object) -> str:
    """SHA-256 (hex) of the settings that a federation's sites are sent, by which people compare them."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()
