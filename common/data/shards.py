"""Shards: tables of private rows in any of several formats, as columns and cells. Errors never quote a row."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.section import TableConfig
from common.data.folders import labelled_images, parts
from common.data.text_tables import DELIMITERS, Cells as Cells, csv_rows, decoded, sheet_rows
from common.errors import DataError
from common.system.files import is_lfs_pointer

_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}
_ENDINGS |= {".parquet": "parquet", ".xlsx": "xlsx", ".xlsm": "xlsx"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # in a folder written by `datasets`
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 cannot


@dataclass(frozen=True, repr=False)
class Table:
    """A shard's content.

    Attributes:
        columns: names of the columns; empty where there are no rows.
        rows: pairs (the row's number for people, cells by column), read as they are used.
        header: whether ``columns`` are known to be names: the first line of a CSV file may be a private row.
        how: the detected format, in words.
    """

    columns: list[str]
    rows: Iterable[tuple[int, Cells]]
    header: bool = True
    how: str = ""


@contextmanager
def shard(path: Path, config: TableConfig, wanted: list[str] | None) -> Iterator[Table]:
    """Open a shard for reading.

    Args:
        path: the file or folder.
        config: format and options; its own path is ignored.
        wanted: columns whose cells are needed; None: all.

    Raises:
        DataError: the shard cannot be opened, or a row cannot be read.
    """
    kind, files = _files(path, config)
    try:
        yield _READERS[kind](path, config, wanted) if files is None else _together(path, kind, files, config, wanted)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers raise anything, and their text may quote a row
        raise DataError(f"shard {path} is not readable as {kind} ({type(error).__name__})") from None


def load_cells(path: Path) -> tuple[list[str], list[Cells]]:
    """All of a shard: its columns, and its rows as cells by column.

    Raises:
        DataError: see ``shard``; or a cell is no text that UTF-8 can hold.
    """
    with shard(path, TableConfig(path=str(path)), None) as table:
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


def _files(path: Path, config: TableConfig) -> tuple[str, list[Path] | None]:
    """The format to read ``path`` with; and the files to read, where it is a folder of tables."""
    try:
        size = path.stat().st_size
        saved = path.is_dir() and any((path / name).exists() for name in _SAVED)
    except FileNotFoundError:
        raise DataError(f"shard {path} does not exist") from None
    except OSError as error:
        raise DataError(f"shard {path} cannot be read ({error.strerror})") from None
    kind: str = config.format
    of_files = kind not in ("dataset", "image-folder")
    if path.is_dir():
        if saved and kind == "auto":
            return "dataset", None
        if of_files and (found := parts(path, _ENDINGS, kind, config.split)):
            return found
        if of_files and kind != "auto":
            raise DataError(f"shard {path} holds no table of format {kind}")
        kind = "image-folder" if kind == "auto" else kind
    elif of_files:
        kind = _file_kind(path, kind, size)
    if config.split is not None and kind != "dataset":
        raise DataError(f"data.split is {config.split!r}, but shard {path} has no splits; leave it out")
    return kind, None


def _file_kind(path: Path, kind: str, size: int) -> str:
    """The format of one file."""
    if is_lfs_pointer(path):
        raise DataError(f"shard {path} is a Git-LFS pointer, not the data itself; run git lfs pull in its folder")
    ending = path.suffix.lower()
    if kind == "auto" and ending not in _ENDINGS:
        hint = "save it as .xlsx or CSV" if ending in (".xls", ".ods") else "name it in data.format"
        raise DataError(f"shard {path}: ending {path.suffix!r} is unknown; {hint}")
    if size == 0:
        raise DataError(f"shard {path} is empty")
    return _ENDINGS[ending] if kind == "auto" else kind


def _together(path: Path, kind: str, files: list[Path], config: TableConfig, wanted: list[str] | None) -> Table:
    """The tables of several files as one, whose rows are numbered through."""
    first = _READERS[kind](files[0], config, wanted)

    def rows() -> Iterator[tuple[int, Cells]]:
        number = 0
        for file in files:
            table = first if file is files[0] else _READERS[kind](file, config, wanted)
            if table.columns and set(first.columns) - set(table.columns):
                raise DataError(f"shard {path}: {file.name} has other columns than {files[0].name}")
            for _, cells in table.rows:
                number += 1
                yield number, cells

    how = f"{first.how}, {len(files)} file(s)" + (f" of split {config.split}" if config.split else "")
    return Table(first.columns, rows(), first.header, how)


def _jsonl(path: Path, config: TableConfig, wanted: list[str] | None) -> Table:
    """One object per line; or a file that is one array of objects."""
    del wanted
    text, encoding = decoded(path, config.encoding)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.lstrip().startswith("["):
        rows = list(enumerate(_json(path, 1, text), start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(number, _json(path, number, line)) for number, line in lines if line.strip()]
    for number, cells in rows:
        if not isinstance(cells, dict):
            raise DataError(f"shard {path}, row {number}: must be a JSON object, is {type(cells).__name__}")
    return Table(list(dict.fromkeys(column for _, cells in rows for column in cells)), rows, how=f"JSONL, {encoding}")


def _json(path: Path, line: int, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"shard {path}, line {line + error.lineno - 1}: not valid JSON ({error.msg})") from None


def _csv(path: Path, config: TableConfig, wanted: list[str] | None) -> Table:
    """With a header; a row's number counts from the line after it."""
    text, encoding = decoded(path, config.encoding)
    columns, rows, delimiter = csv_rows(path, text, config.delimiter, wanted)
    how = f"CSV, {DELIMITERS.get(delimiter, repr(delimiter))} between cells, {encoding}"
    return Table(columns, rows, header=False, how=how)


def _xlsx(path: Path, config: TableConfig, wanted: list[str] | None) -> Table:
    columns, rows, sheet = sheet_rows(path, config.sheet, wanted)
    return Table(columns, rows, header=False, how=f"Excel, sheet {sheet}")


def _parquet(path: Path, config: TableConfig, wanted: list[str] | None) -> Table:
    """Read in batches, so that no more than one is in memory twice; with what `datasets` noted of its columns."""
    del config
    from pyarrow import parquet  # type: ignore[import-untyped]

    with parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        noted = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    features = (noted.get("info") or {}).get("features") or {}
    used = [column for column in columns if wanted is None or column in wanted]

    def rows() -> Iterator[Cells]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=used):
                yield from batch.to_pylist()

    return Table(columns, enumerate((_named(row, features) for row in rows()), start=1), how="Parquet")


def _dataset(path: Path, config: TableConfig, wanted: list[str] | None) -> Table:
    """A folder written by ``Dataset.save_to_disk``, or by ``DatasetDict``'s."""
    import datasets

    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if (config.split is None and len(dataset) > 1) or config.split not in (None, *dataset):
            raise DataError(f"shard {path} holds several splits; name one in data.split: {', '.join(dataset)}")
        dataset = dataset[config.split or next(iter(dataset))]
    elif config.split is not None:
        raise DataError(f"data.split is {config.split!r}, but shard {path} has no splits; leave it out")
    used = dataset.select_columns([column for column in dataset.column_names if wanted is None or column in wanted])
    features = used.features.to_dict()
    rows = enumerate((_named(row, features) for row in used), start=1)
    return Table(dataset.column_names, rows, how="saved by datasets")


def _image_folder(path: Path, config: TableConfig, wanted: list[str] | None) -> Table:
    del config, wanted
    rows = labelled_images(path)
    return Table(["image", "label"] if rows else [], enumerate(rows, start=1), how="a folder of images")


def _named(value: Any, feature: Any) -> Any:  # noqa: ANN401
    """A cell of a `datasets` column with the names of its classes in place of their numbers; -1 is no class."""
    if isinstance(feature, list) and isinstance(value, list):
        return [_named(item, feature[0]) for item in value]
    if not isinstance(feature, dict):
        return value
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names") or []
        known = isinstance(value, int) and 0 <= value < len(names)
        return names[value] if known else None if value == -1 else value
    if isinstance(value, list) and "feature" in feature:
        return [_named(item, feature["feature"]) for item in value]
    if isinstance(value, dict):
        return {key: _named(cell, feature.get(key)) for key, cell in value.items()}
    return value


_READERS: dict[str, Callable[[Path, TableConfig, list[str] | None], Table]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "xlsx": _xlsx,
    "parquet": _parquet,
    "dataset": _dataset,
    "image-folder": _image_folder,
}
