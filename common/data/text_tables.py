"""Tables that people save from other programs: CSV of any delimiter and encoding, and Excel's workbooks.

Cells stay the text they are: type inference, as in ``datasets``, makes 7.0 of the code 007, a date of 2020-01-01, and
nothing of NA. A detected format is reported; where detection is not clear, an error asks for the key.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from common.errors import DataError

csv.field_size_limit(2**31 - 1)  # characters in a cell; a long note is no mistake
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_SAMPLE = 65_536  # characters
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
Cells = dict[str, Any]


def decoded(path: Path, encoding: str | None) -> tuple[str, str]:
    """A file's text without a byte order mark, its line ends as they are; and the encoding that it is in.

    Args:
        path: the file.
        encoding: Python's name of the encoding; None: by its mark, UTF-8, or cp1252 where that gives a western text.

    Raises:
        DataError: it is not in that encoding, or none fits.
    """
    data = path.read_bytes()
    mark, name = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    if not mark and data[:4096].count(0) * 3 > len(data[:4096]):
        name = "utf-16-le" if data[1:4096:2].count(0) > data[:4096:2].count(0) else "utf-16-be"
    try:
        return data.decode(encoding or name).removeprefix("\ufeff"), encoding or name
    except UnicodeDecodeError as error:
        offset = error.start
    if encoding is not None:
        raise DataError(f"shard {path} is not {encoding} (at byte offset {offset}); correct data.encoding")
    try:
        text = "" if mark else data.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    if not _western(text):
        hint = "name its encoding in data.encoding, or save it as UTF-8"
        raise DataError(f"shard {path} is not UTF-8 (at byte offset {offset}), and not clearly cp1252; {hint}")
    return text, "cp1252"


def _western(text: str) -> bool:
    """Whether cp1252 gave words as Western Europe writes them: within words only letters, few of them beyond ASCII."""
    within = re.findall(r"(?<=[A-Za-z])[^\x00-\x7f](?=[A-Za-z])", text)
    beyond = sum(character > "\x7f" and character.isalpha() for character in text)
    plain = sum(character < "\x80" and character.isalpha() for character in text)
    return bool(text) and all(c.isalpha() or c in "’´­" for c in within) and 3 * beyond <= plain


def delimiter_of(text: str, wanted: list[str] | None) -> str:
    """The delimiter that finds most of the ``wanted`` columns in the first line; among equals, the most even rows."""

    def fits(delimiter: str) -> tuple[int, float, int]:
        rows = []
        try:
            for row in csv.reader(io.StringIO(text[:_SAMPLE], newline=""), delimiter=delimiter):
                rows.append(row)
        except csv.Error:  # with a wrong delimiter, quotes may stand anywhere
            pass
        header = rows[0] if rows else []
        even = sum(len(row) == len(header) for row in rows[:50]) / max(len(rows[:50]), 1)
        return sum(column in header for column in wanted or []), even * (len(header) > 1), len(header)

    return max(DELIMITERS, key=fits)


def csv_rows(
    path: Path, text: str, delimiter: str | None, wanted: list[str] | None
) -> tuple[list[str], list[tuple[int, Cells]], str]:
    """Columns, rows with their numbers after the first line, and the delimiter; Excel's line ``sep=;`` says it.

    Raises:
        DataError: it is no CSV, or two wanted columns have one name.
    """
    if said := re.match(r"sep=(.)\r?\n", text):
        text, delimiter = text[said.end() :], delimiter or said[1]
    delimiter = delimiter or delimiter_of(text, wanted)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: list[tuple[int, Cells]] = []
    try:
        columns = list(reader.fieldnames or [])
        one_name_each(path, columns, wanted)
        for number, cells in enumerate(reader, start=1):
            if None in cells:
                raise DataError(f"shard {path}, row {number}: has more cells than the first line")
            rows.append((number, cells))
    except csv.Error as error:
        raise DataError(f"shard {path}, line {reader.reader.line_num}: not valid CSV ({error})") from None
    return columns, rows, delimiter


def one_name_each(path: Path, columns: list[str], wanted: list[str] | None) -> None:
    """Raise a DataError when two of the wanted columns, or of all, have one name."""
    for column in columns if wanted is None else wanted:
        if column and columns.count(column) > 1:
            places = " and ".join(str(place) for place, name in enumerate(columns, start=1) if name == column)
            what = "have one name" if wanted is None else f"are both named {column!r}"  # unasked, it may be a cell
            raise DataError(f"shard {path}: columns {places} {what}; rename or delete one")


def sheet_rows(
    path: Path, sheet: str | None, wanted: list[str] | None
) -> tuple[list[str], Iterator[tuple[int, Cells]], str]:
    """Columns of a sheet's first row, the rows below by the sheet's own numbers, and its name.

    Args:
        path: an .xlsx workbook. Formulas give the values that were saved with them.
        sheet: its name; None: the only one, or the only one that has the wanted columns.
        wanted: columns.

    Raises:
        DataError: there is no such sheet, or more than one could be meant.
    """
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    headers = {}
    for page in book.worksheets:
        header = next(page.iter_rows(max_row=1, values_only=True), ())
        headers[page.title] = ["" if cell is None else str(_plain(cell)) for cell in header]
    fits = [name for name, header in headers.items() if any(header) and set(wanted or []) <= set(header)]
    chosen = [sheet] if sheet is not None else fits or [name for name, header in headers.items() if any(header)]
    if len(chosen) != 1 or chosen[0] not in headers:
        what = f"has no sheet {sheet!r}" if sheet is not None else "has several sheets that could be meant"
        raise DataError(f"shard {path} {what}; name one in data.sheet: {', '.join(headers)}")
    columns = headers[chosen[0]]
    one_name_each(path, columns, wanted)

    def rows() -> Iterator[tuple[int, Cells]]:
        lines = book[chosen[0]].iter_rows(min_row=2, values_only=True)
        for number, cells in enumerate(lines, start=2):
            if any(cell is not None for cell in cells):
                yield number, dict(zip(columns, map(_plain, cells), strict=False))

    return columns, rows(), chosen[0]


def _plain(cell: Any) -> Any:  # noqa: ANN401
    """A workbook's cell as a text or number; a date as its ISO form, without midnight."""
    if isinstance(cell, datetime) and cell.time() == time():
        cell = cell.date()
    return cell.isoformat() if isinstance(cell, date | time) else cell
