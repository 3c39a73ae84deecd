"""Private rows: a shard in any of four formats becomes prompts and answers. Errors never quote a row."""

import difflib
import hashlib
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import DataConfig, resolve
from common.errors import DataError

_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_READERS = {"jsonl": "json", "csv": "csv", "parquet": "parquet"}  # our name -> the builder of `datasets`


@dataclass(frozen=True, repr=False)
class Row:
    """One example. It has no readable repr, so that it cannot slip into a log or an error message."""

    prompt: str
    answer: str

    def key(self) -> str:
        """A hash of the content, by which rows are split and ordered."""
        return hashlib.sha256(f"{self.prompt}\x00{self.answer}".encode()).hexdigest()


def load_rows(config: DataConfig, beside: Path) -> list[Row]:
    """All rows of a shard, in its order.

    Args:
        config: where the shard is, and which columns or templates make a prompt and an answer.
        beside: the file that holds ``config``; a relative path is relative to its folder.

    Raises:
        DataError: names the shard and what is wrong: the file, a column, or a row's number.
    """
    path = resolve(config.path, beside)
    prompt, answer = _Template(config.prompt, "prompt"), _Template(config.answer, "answer")
    with tempfile.TemporaryDirectory(prefix="fedspan-rows-") as cache:  # no copy of a private shard is left behind
        table = _read(path, config, cache)
        if len(table) == 0:
            raise DataError(f"shard {path} has no rows")
        for template in (prompt, answer):
            template.check(path, table.column_names)
        return [
            Row(prompt.fill(path, number, raw), answer.fill(path, number, raw))
            for number, raw in enumerate(table, start=1)
        ]


def split_held_out(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Rows for training and rows held out, about ``share`` of them.

    A row's side depends on its content alone: order and later additions move nothing, equal rows stay together.

    Raises:
        DataError: no row is left to train on.
    """
    held_out = [row for row in rows if int(row.key()[:13], 16) / 16**13 < share]
    train = [row for row in rows if int(row.key()[:13], 16) / 16**13 >= share]
    if not train:
        raise DataError(f"held_out {share} leaves none of the shard's {len(rows)} rows for training")
    return train, held_out


class _Template:
    """A column name, or a text with column names in braces."""

    def __init__(self, text: str, key: str) -> None:
        self._text, self._key = text, key
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise DataError(f"data.{key}: template is not readable ({error}); columns go in braces") from None
        self._is_template = bool(fields)
        self.columns = fields or [text]

    def check(self, path: Path, there: list[str]) -> None:
        for column in self.columns:
            if column not in there:
                near = difflib.get_close_matches(column, there, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise DataError(
                    f"data.{self._key}: shard {path} has no column {column!r}; {hint}columns: {', '.join(there)}"
                )

    def fill(self, path: Path, number: int, raw: dict[str, Any]) -> str:
        for column in self.columns:
            value = raw[column]
            if not isinstance(value, (str, int, float)) or isinstance(value, bool) or not str(value).strip():
                what = "empty" if value is None or isinstance(value, str) else f"no text but {type(value).__name__}"
                raise DataError(f"shard {path}, row {number}: column {column!r} is {what}")
        if not self._is_template:
            return str(raw[self._text]).strip()
        return self._text.format_map({column: str(raw[column]).strip() for column in self.columns})


def _read(path: Path, config: DataConfig, cache: str) -> Any:  # noqa: ANN401 - `datasets` ships no types
    """The shard as a `datasets` table."""
    import datasets

    if not path.exists():
        raise DataError(f"shard {path} does not exist")
    kind = config.format
    if kind == "auto":
        kind = "dataset" if path.is_dir() else _FORMATS.get(path.suffix.lower(), "auto")  # type: ignore[assignment]
    if kind == "auto":
        raise DataError(f"shard {path}: ending {path.suffix!r} is unknown; name it in data.format")
    if kind != "dataset" and path.stat().st_size == 0:
        raise DataError(f"shard {path} is empty")
    datasets.disable_progress_bars()
    try:
        if kind != "dataset":
            return datasets.load_dataset(_READERS[kind], data_files=str(path), split="train", cache_dir=cache)
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - readers raise anything, and their text may quote a row
        raise DataError(f"shard {path} is not readable as {kind} ({type(error).__name__})") from None
    if isinstance(table, datasets.DatasetDict):
        raise DataError(f"shard {path} holds several splits ({', '.join(table)}); point data.path at one of them")
    return table
