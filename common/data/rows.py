"""Private rows: a shard in any of five formats becomes prompts and answers. Errors never quote a row."""

import csv
import difflib
import hashlib
import io
import json
import logging
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.federation import DataConfig, resolve
from common.errors import DataError

log = logging.getLogger(__name__)
csv.field_size_limit(2**31 - 1)  # characters in a cell; a long note is no mistake
_ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # in a folder written by `datasets`
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # beside the labels' folders
_LITTER = {"thumbs.db", "desktop.ini"}  # what file managers leave, in lower case
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
    prompt, answer = Template(config.prompt, "data.prompt"), Template(config.answer, "data.answer")
    kind = _kind(path, config.format)
    wanted = [*prompt.columns, *answer.columns]
    rows: list[Row] = []
    try:
        table = _READERS[kind](path, wanted)
        if not table.columns:
            raise DataError(f"shard {path} has no rows")
        named = {"data.prompt": prompt.columns, "data.answer": answer.columns}
        check_columns(path, table.columns, named, header=kind != "csv")
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
        DataError: see ``load_rows``; or a cell is no text that UTF-8 can hold.
    """
    kind = _kind(path, "auto")
    try:
        table = _READERS[kind](path, None)
        cells = [_writable(path, number, row) for number, row in table.rows]
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers raise anything, and their text may quote a row
        raise DataError(f"shard {path} is not readable as {kind} ({type(error).__name__})") from None
    if not cells:
        raise DataError(f"shard {path} has no rows")
    return table.columns, cells


def check_columns(path: Path, there: list[str], wanted: dict[str, list[str]], *, header: bool) -> None:
    """Hold the columns of a shard against those that are wanted.

    Args:
        path: the shard, for the error.
        there: its columns.
        wanted: columns by the key or option that names them.
        header: ``there`` is surely no row. The first line of a CSV file without a header is a private one, in which one
            cell may well be a wanted name: without ``header`` it takes two of them before an error may quote it.

    Raises:
        DataError: a column is missing.
    """
    told = header or len({column for columns in wanted.values() for column in columns} & set(there)) > 1
    for key, columns in wanted.items():
        for column in columns:
            if column in there:
                continue
            near = difflib.get_close_matches(column, there, n=1)
            hint = (f"did you mean {near[0]!r}? " if near else "") + f"columns: {', '.join(there)}"
            if not told:
                hint = f"its first line must hold the column names, separated by commas (it has {len(there)} cells)"
            raise DataError(f"{key}: shard {path} has no column {column!r}; {hint}")


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


class Template:
    """A column name, or a text with column names in braces; ``columns`` are those it needs.

    Raises:
        DataError: it is not readable; names ``key``, which it is given by.
    """

    def __init__(self, text: str, key: str) -> None:
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"{key}: template is not readable ({error}); columns go in braces") from None
        self.columns = [name for _, name, _, _ in self._parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in self._parts) or not all(self.columns):
            raise DataError(f"{key}: template is not readable; between braces there must be a column's name only")
        if not self.columns:
            self.columns, self._parts = [text], [("", text, "", None)]

    def fill(self, path: Path, number: int, cells: Cells) -> str:
        """Its text for row ``number``.

        Raises:
            DataError: a cell is empty or no text.
        """
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


def _writable(path: Path, number: int, cells: Cells) -> Cells:
    """``cells``, when they can be written as UTF-8, lists and mappings in them too."""
    for column, value in cells.items():
        if _SURROGATE.search(column + json.dumps(value, ensure_ascii=False, default=str)):
            raise DataError(f"shard {path}, row {number}: column {column!r} is no text but half of a surrogate pair")
    return cells


def _kind(path: Path, kind: str) -> str:
    """The format to read ``path`` with: ``kind``, or what ``auto`` comes to."""
    try:
        size = path.stat().st_size
        saved = path.is_dir() and any((path / name).exists() for name in _SAVED)
    except FileNotFoundError:
        raise DataError(f"shard {path} does not exist") from None
    except OSError as error:
        raise DataError(f"shard {path} cannot be read ({error.strerror})") from None
    if kind == "auto":
        found = ("dataset" if saved else "image-folder") if path.is_dir() else _ENDINGS.get(path.suffix.lower())
        if found is None:
            raise DataError(f"shard {path}: ending {path.suffix!r} is unknown; name it in data.format")
        return found
    if kind not in ("dataset", "image-folder") and size == 0:
        raise DataError(f"shard {path} is empty")
    return kind


def _utf8(path: Path) -> str:
    """A file's text without a byte order mark, its line ends as they are."""
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"shard {path} is not UTF-8 (at byte offset {error.start}); save it as UTF-8") from None


def _jsonl(path: Path, wanted: list[str] | None) -> _Table:
    """One object per line; or a file that is one array of objects."""
    del wanted
    text = _utf8(path).replace("\r\n", "\n").replace("\r", "\n")
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
    rows: list[tuple[int, Cells]] = []
    reader = csv.DictReader(io.StringIO(_utf8(path), newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        for column in columns if wanted is None else wanted:
            if column and columns.count(column) > 1:
                places = " and ".join(str(place) for place, name in enumerate(columns, start=1) if name == column)
                what = "have one name" if wanted is None else f"are both named {column!r}"  # unasked, it may be a cell
                raise DataError(f"shard {path}: columns {places} {what}; rename or delete one")
        for number, cells in enumerate(reader, start=1):
            if None in cells:
                raise DataError(f"shard {path}, row {number}: has more cells than the first line")
            rows.append((number, cells))
    except csv.Error as error:
        raise DataError(f"shard {path}, line {reader.reader.line_num}: not valid CSV ({error})") from None
    return _Table(columns, rows)


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
    """One sub-folder per label, with images in it or below it, by name; every file there counts as an image."""
    del wanted
    rows: list[Cells] = []
    beside = 0
    for entry in _entries(path, path):
        if os.path.isfile(entry):  # noqa: PTH113 - of a link that leads nowhere, Path.is_file may raise
            beside += Path(entry).suffix.lower() in _IMAGES
        else:
            label = path / entry.name
            rows += [{"image": str(file), "label": entry.name} for file in _files(label, label)]
    if beside:
        raise DataError(
            f"shard {path}: {beside} image(s) beside the labels' folders; move each into its label's folder"
        )
    return _Table(["image", "label"] if rows else [], enumerate(rows, start=1))


def _files(folder: Path, label: Path) -> Iterator[Path]:
    """Files in a folder and below it. A link to a folder is not followed but given, as an image that is unreadable."""
    for entry in _entries(folder, label):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name, label)
        elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
            yield folder / entry.name


def _entries(folder: Path, label: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, but dot files and litter. Below ``label``, only the log names the folder."""
    try:
        with os.scandir(folder) as found:
            kept = [entry for entry in found if not entry.name.startswith(".") and entry.name.lower() not in _LITTER]
    except OSError as error:
        log.error("folder %s cannot be listed", folder)  # the preflight shows no warnings of this module
        where = (
            f"folder {label}" if folder == label else f"a folder below {label}, which the log of this machine names,"
        )
        raise DataError(f"{where} cannot be listed ({error.strerror})") from None
    return sorted(kept, key=lambda entry: entry.name)


_READERS: dict[str, Callable[[Path, list[str] | None], _Table]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "dataset": _dataset,
    "image-folder": _image_folder,
}
