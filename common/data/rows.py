"""Private rows: the cells of a shard become prompts and answers. Errors never quote a row."""

import difflib
import hashlib
import string
from dataclasses import dataclass
from pathlib import Path

from common.config.section import DataConfig, resolve
from common.data.shards import SURROGATE, Cells, shard
from common.errors import DataError


@dataclass(frozen=True, repr=False)
class Row:
    """One example. It has no readable repr, so that it cannot slip into a log or an error message.

    ``content`` is the digest of the file that ``prompt`` names; empty when the prompt is text.
    """

    prompt: str
    answer: str
    content: str | None = None

    def key(self) -> str:
        """A hash of the content, by which rows are split and ordered."""
        return hashlib.sha256(f"{self.content or self.prompt}\x00{self.answer}".encode()).hexdigest()


def load_rows(config: DataConfig, beside: Path) -> list[Row]:
    """Read all rows of a shard, in order. Nothing is copied to disk.

    Args:
        config: the shard's path, and the columns or templates of prompt and answer.
        beside: the file that holds ``config``; relative paths start at that file's folder.

    Raises:
        DataError: the text names the shard and the mistake: a file, a column, or a row's number (JSONL: the line).
    """
    path = resolve(config.path, beside)
    prompt, answer = Template(config.prompt, "data.prompt"), Template(config.answer, "data.answer")
    with shard(path, config.format, [*prompt.columns, *answer.columns]) as table:
        if not table.columns:
            raise DataError(f"shard {path} has no rows")
        named = {"data.prompt": prompt.columns, "data.answer": answer.columns}
        check_columns(path, table.columns, named, header=table.header)
        rows = [Row(prompt.fill(path, number, cells), answer.fill(path, number, cells)) for number, cells in table.rows]
    if not rows:
        raise DataError(f"shard {path} has no rows")
    return rows


def check_columns(path: Path, there: list[str], wanted: dict[str, list[str]], *, header: bool) -> None:
    """Check that a shard has the wanted columns.

    Args:
        path: the shard, for the error.
        there: the shard's columns.
        wanted: the wanted columns, by the key or option that names them.
        header: whether ``there`` is known to be no row. In a CSV file without header the first line is a private row,
            and one of its cells may equal a wanted name. So without ``header`` two names must match before an error
            may quote the line.

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

    The side depends on the row's content alone: neither order nor later additions move a row, and equal rows stay
    together.

    Raises:
        DataError: no row is left to train on.
    """
    held_out = [row for row in rows if int(row.key()[:13], 16) / 16**13 < share]
    train = [row for row in rows if int(row.key()[:13], 16) / 16**13 >= share]
    if not train:
        raise DataError(f"held_out {share} leaves none of the shard's {len(rows)} rows for training")
    return train, held_out


class Template:
    """A column name, or a text with column names in braces; ``columns`` are the columns that the template uses.

    Raises:
        DataError: the template is not readable; the text names ``key``, the template's key in the file.
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
        """The template's text for row ``number``.

        Raises:
            DataError: a cell is empty or holds no text.
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
    elif SURROGATE.search(str(value)):
        what = "no text but half of a surrogate pair"
    else:
        return str(value).strip()
    raise DataError(f"shard {path}, row {number}: column {column!r} is {what}")
