"""Private rows: a shard in any of five formats becomes prompts and answers. Errors never quote a row."""

import csv
import difflib
import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import DataConfig, resolve
from common.errors import DataError

_ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # in a folder written by `datasets`
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 cannot
Cells = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Row:
    """One example. It has no readable repr, so that it cannot slip into a log or an error message.

    ``content`` is a digest of what ``prompt`` names, where that is a file.
    """

    prompt: str
    answer: str
    content: str | None = None

    def key(self) -> str:
        """A hash of the content, by which rows are split and ordered."""
        return hashlib.sha256(f"{self.content or self.prompt}\x00{self.answer}".encode()).hexdigest()


@dataclass(frozen=True, repr=False)
class _Table:
    """A shard before templates are applied: its columns, and its rows with the number a person counts them by."""

    columns: list[str]
    rows: Iterable[tuple[int, Cells]]


def load_rows(config: DataConfig, beside: Path) -> list[Row]:
    """All rows of a shard, in its order. Nothing is copied to disk.

    Text formats are read by the standard library, because cells must stay the text they are: type inference, as in
    ``datasets``, makes 7.0 of the code 007, a date of 2020-01-01, and nothing of NA.

    Args:
        config: where the shard is, and which columns or templates make a prompt and an answer.
        beside: the file that holds ``config``; a relative path is relative to its folder.

    Raises:
        DataError: names the shard and what is wrong: the file, a column, or a row's number (of JSONL: the line).
    """
    path = resolve(config.path, beside)
    prompt, answer = _Template(config.prompt, "prompt"), _Template(config.answer, "answer")
    kind = _kind(path, config.format)
    wanted = [*prompt.columns, *answer.columns]
    rows: list[Row] = []
    try:
        table = _READERS[kind](path, wanted)
        if not table.columns:
            raise DataError(f"shard {path} has no rows")
        # The first line of a CSV file without a header is a private row: it is listed only when it is surely a header.
        listed = kind != "csv" or bool(set(wanted) & set(table.columns))
        for template in (prompt, answer):
            template.check(path, table.columns, listed=listed)
        for number, cells in table.rows:
            rows.append(Row(prompt.fill(path, number, cells), answer.fill(path, number, cells)))
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers raise anything, and their text may quote a row
        raise DataError(f"shard {path} is not readable as {kind} ({type(error).__name__})") from None
    if not rows:
        raise DataError(f"shard {path} has no rows")
    return rows


def load_cells(path: Path) -> tuple[list[str], list[Cells]]:
    """A shard as it is: its columns, and its rows' cells by column.

    Raises:
        DataError: see ``load_rows``.
    """
    kind = _kind(path, "auto")
    try:
        table = _READERS[kind](path, None)
        cells = [row for _, row in table.rows]
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers raise anything, and their text may quote a row
        raise DataError(f"shard {path} is not readable as {kind} ({type(error).__name__})") from None
    if not cells:
        raise DataError(f"shard {path} has no rows")
    return table.columns, cells


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
        self._key = key
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"data.{key}: template is not readable ({error}); columns go in braces") from None
        self.columns = [name for _, name, _, _ in self._parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in self._parts) or not all(self.columns):
            raise DataError(f"data.{key}: template is not readable; between braces there must be a column's name only")
        if not self.columns:
            self.columns, self._parts = [text], [("", text, "", None)]

    def check(self, path: Path, there: list[str], *, listed: bool) -> None:
        for column in self.columns:
            if column not in there:
                near = difflib.get_close_matches(column, there, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                if listed or near:
                    hint += f"columns: {', '.join(there)}"
                else:
                    hint = f"its first line must hold the column names, separated by commas (it has {len(there)} cells)"
                raise DataError(f"data.{self._key}: shard {path} has no column {column!r}; {hint}")

    def fill(self, path: Path, number: int, cells: Cells) -> str:
        return "".join(
            literal + ("" if column is None else _text(path, number, column, cells.get(column)))
            for literal, column, _, _ in self._parts
        )


def _text(path: Path, number: int, column: str, value: object) -> str:
    """A cell as text, without white space around it; numbers count as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        what = f"no text but {type(value).__name__}"
    elif value is None or value != value or not str(value).strip():  # NaN differs from itself
        what = "empty"
    elif _SURROGATE.search(str(value)):
        what = "no text but half of a surrogate pair"
    else:
        return str(value).strip()
    raise DataError(f"shard {path}, row {number}: column {column!r} is {what}")


def _kind(path: Path, kind: str) -> str:
    """The format to read ``path`` with: ``kind``, or what ``auto`` comes to."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"shard {path} does not exist") from None
    except OSError as error:
        raise DataError(f"shard {path} cannot be read ({error.strerror})") from None
    if kind == "auto":
        folder = "dataset" if any((path / name).exists() for name in _SAVED) else "image-folder"
        found = folder if path.is_dir() else _ENDINGS.get(path.suffix.lower())
        if found is None:
            raise DataError(f"shard {path}: ending {path.suffix!r} is unknown; name it in data.format")
        return found
    if kind not in ("dataset", "image-folder") and size == 0:
        raise DataError(f"shard {path} is empty")
    return kind


def _jsonl(path: Path, wanted: list[str] | None) -> _Table:
    """One object per line; or a file that is one array of objects."""
    del wanted
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = list(enumerate(_json(path, 1, text), start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(number, _json(path, number, line)) for number, line in lines if line.strip()]
    for number, cells in rows:
        if not isinstance(cells, dict):
            raise DataError(f"shard {path}, row {number}: must be a JSON object, is {type(cells).__name__}")
    return _Table(list(dict.fromkeys(column for _, cells in rows for column in cells)), rows)


def _json(path: Path, line: int, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"shard {path}, line {line + error.lineno - 1}: not valid JSON ({error.msg})") from None


def _csv(path: Path, wanted: list[str] | None) -> _Table:
    """Comma-separated, with a header; a row's number counts from the line after it."""
    del wanted
    rows: list[tuple[int, Cells]] = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for number, cells in enumerate(reader, start=1):
                if None in cells:
                    raise DataError(f"shard {path}, row {number}: has more cells than the first line")
                rows.append((number, cells))
        except csv.Error as error:
            raise DataError(f"shard {path}, line {reader.line_num}: not valid CSV ({error})") from None
    return _Table(list(reader.fieldnames or []), rows)


def _parquet(path: Path, wanted: list[str] | None) -> _Table:
    from pyarrow import parquet  # type: ignore[import-untyped]

    columns = parquet.read_schema(path).names
    table = parquet.read_table(path, columns=[column for column in columns if wanted is None or column in wanted])
    return _Table(columns, enumerate(table.to_pylist(), start=1))


def _dataset(path: Path, wanted: list[str] | None) -> _Table:
    """A folder written by ``Dataset.save_to_disk``."""
    import datasets

    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"shard {path} holds several splits ({', '.join(dataset)}); point data.path at one of them")
    used = dataset.select_columns([column for column in dataset.column_names if wanted is None or column in wanted])
    return _Table(dataset.column_names, enumerate(used, start=1))


def _image_folder(path: Path, wanted: list[str] | None) -> _Table:
    """One sub-folder per label, with images in it or below it; by name."""
    del wanted
    files = sorted(file for file in path.glob("*/**/*") if file.suffix.lower() in _IMAGES and file.is_file())
    labelled = [{"image": str(file), "label": file.relative_to(path).parts[0]} for file in files]
    return _Table(["image", "label"] if files else [], enumerate(labelled, start=1))


_READERS: dict[str, Callable[[Path, list[str] | None], _Table]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "dataset": _dataset,
    "image-folder": _image_folder,
}
