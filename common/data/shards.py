"""Shards: tables of private rows in any of five formats, as columns and cells. Errors never quote a row.

Text formats are read by the standard library, because cells must stay the text they are: type inference, as in
``datasets``, makes 7.0 of the code 007, a date of 2020-01-01, and nothing of NA.
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError

log = logging.getLogger(__name__)
csv.field_size_limit(2**31 - 1)  # characters in a cell; a long note is no mistake
_ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # in a folder written by `datasets`
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # beside the labels' folders
_LITTER = {"thumbs.db", "desktop.ini"}  # files that file managers write, in lower case
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 cannot
Cells = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Table:
    """A shard's content.

    Attributes:
        columns: names of the columns; empty where there are no rows.
        rows: pairs (the row's number for people, cells by column), read as they are used.
        header: whether ``columns`` are known to be names: the first line of a CSV file may be a private row.
    """

    columns: list[str]
    rows: Iterable[tuple[int, Cells]]
    header: bool = True


@contextmanager
def shard(path: Path, kind: str, wanted: list[str] | None) -> Iterator[Table]:
    """Open a shard for reading.

    Args:
        path: the file or folder.
        kind: the format; ``auto``: by the file's ending, or by the folder's files.
        wanted: columns whose cells are needed; None: all.

    Raises:
        DataError: the shard cannot be opened, or a row cannot be read.
    """
    kind = _kind(path, kind)
    try:
        yield _READERS[kind](path, wanted)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers raise anything, and their text may quote a row
        raise DataError(f"shard {path} is not readable as {kind} ({type(error).__name__})") from None


def load_cells(path: Path) -> tuple[list[str], list[Cells]]:
    """All of a shard: its columns, and its rows as cells by column.

    Raises:
        DataError: see ``shard``; or a cell is no text that UTF-8 can hold.
    """
    with shard(path, "auto", None) as table:
        cells = [_writable(path, number, row) for number, row in table.rows]
    if not cells:
        raise DataError(f"shard {path} has no rows")
    return table.columns, cells


def _writable(path: Path, number: int, cells: Cells) -> Cells:
    """``cells``, when they can be written as UTF-8, lists and mappings in them too."""
    for column, value in cells.items():
        if SURROGATE.search(column + json.dumps(value, ensure_ascii=False, default=str)):
            raise DataError(f"shard {path}, row {number}: column {column!r} is no text but half of a surrogate pair")
    return cells


def _kind(path: Path, kind: str) -> str:
    """The format of ``path``: ``kind``, or for ``auto`` the format found."""
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


def _jsonl(path: Path, wanted: list[str] | None) -> Table:
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
    return Table(list(dict.fromkeys(column for _, cells in rows for column in cells)), rows)


def _json(path: Path, line: int, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"shard {path}, line {line + error.lineno - 1}: not valid JSON ({error.msg})") from None


def _csv(path: Path, wanted: list[str] | None) -> Table:
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
    return Table(columns, rows, header=False)


def _parquet(path: Path, wanted: list[str] | None) -> Table:
    from pyarrow import parquet  # type: ignore[import-untyped]

    columns = parquet.read_schema(path).names
    table = parquet.read_table(path, columns=[column for column in columns if wanted is None or column in wanted])
    return Table(columns, enumerate(table.to_pylist(), start=1))


def _dataset(path: Path, wanted: list[str] | None) -> Table:
    """A folder written by ``Dataset.save_to_disk``."""
    import datasets

    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"shard {path} holds several splits ({', '.join(dataset)}); point data.path at one of them")
    used = dataset.select_columns([column for column in dataset.column_names if wanted is None or column in wanted])
    return Table(dataset.column_names, enumerate(used, start=1))


def _image_folder(path: Path, wanted: list[str] | None) -> Table:
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
    return Table(["image", "label"] if rows else [], enumerate(rows, start=1))


def _files(folder: Path, label: Path) -> Iterator[Path]:
    """Files in a folder and below it. A link to a folder is not followed but given, as an image that is unreadable."""
    for entry in _entries(folder, label):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name, label)
        elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
            yield folder / entry.name


def _entries(folder: Path, label: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without dot files and litter. Errors name no folder below ``label``; the log does."""
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


_READERS: dict[str, Callable[[Path, list[str] | None], Table]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "dataset": _dataset,
    "image-folder": _image_folder,
}
