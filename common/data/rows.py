"""Private rows: the cells of a shard become prompts and answers. Errors never quote a row."""

import difflib
import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.config.section import DataConfig, resolve
from common.data.shards import SURROGATE, Cells, shard
from common.errors import DataError

_LISTED, _KINDS = 5, 3  # numbers of rows, and kinds of faults, in an error
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}  # other names of roles


@dataclass(frozen=True, repr=False)
class Row:
    """One example. It has no readable repr, so that it cannot slip into a log or an error message.

    ``content`` is a digest of what ``prompt`` names, where that is a file; ``before`` the turns of a conversation
    before its last prompt, each with its role.
    """

    prompt: str
    answer: str
    content: str | None = None
    before: tuple[tuple[str, str], ...] = ()

    def key(self) -> str:
        """A hash of the content, by which rows are split and ordered."""
        text = "".join(f"{role}\x00{said}\x00" for role, said in self.before)
        return hashlib.sha256(f"{text}{self.content or self.prompt}\x00{self.answer}".encode()).hexdigest()


class Loaded(NamedTuple):
    """The usable rows of a shard, how many were left out, and what was detected of its format."""

    rows: list[Row]
    left_out: int
    how: str


class _Wrong(Exception):  # noqa: N818 - collected, never seen
    """A row cannot be used; ``empty``: because a wanted cell is."""

    def __init__(self, what: str, *, empty: bool = False) -> None:
        super().__init__(what)
        self.empty = empty


def load_rows(config: DataConfig, beside: Path) -> Loaded:
    """All rows of a shard, in its order. Nothing is copied to disk.

    Args:
        config: the shard's path, and the columns or templates of prompt and answer.
        beside: the file that holds ``config``; relative paths start at that file's folder.

    Raises:
        DataError: names the shard and what is wrong: the file, a column, or the first rows' numbers (of JSONL: the
            lines) and how many there are.
    """
    path = resolve(config.path, beside)
    make: Callable[[Cells], Row]
    if config.messages is not None:
        column = config.messages
        named, make = {"data.messages": [column]}, lambda cells: _conversation(column, cell(cells, column))
    else:
        prompt, answer = Template(config.prompt, "data.prompt"), Template(config.answer, "data.answer")
        named = {"data.prompt": prompt.columns, "data.answer": answer.columns}
        make = lambda cells: Row(prompt.fill(cells), answer.fill(cells))  # noqa: E731
    wanted = [name for columns in named.values() for column in columns for name in {column, column.split(".")[0]}]
    rows, left_out, wrong = list[Row](), 0, dict[str, list[int]]()
    with shard(path, config, wanted) as table:
        if not table.columns:
            raise DataError(f"shard {path} has no rows")
        check_columns(path, table.columns, named, header=table.header, how=table.how)
        for number, cells in table.rows:
            try:
                rows.append(make(cells))
            except _Wrong as fault:
                left_out += (skipped := fault.empty and config.skip_empty)
                if not skipped:
                    wrong.setdefault(str(fault), []).append(number)
    _refuse(path, wrong)
    if not rows:
        raise DataError(f"shard {path} has no rows" + (f" but {left_out} with empty cells" if left_out else ""))
    return Loaded(rows, left_out, table.how)


def filled(path: Path, template: "Template", rows: list[Cells]) -> list[str]:
    """A template's text for every row.

    Raises:
        DataError: see ``load_rows``.
    """
    texts, wrong = list[str](), dict[str, list[int]]()
    for number, cells in enumerate(rows, start=1):
        try:
            texts.append(template.fill(cells))
        except _Wrong as fault:
            wrong.setdefault(str(fault), []).append(number)
    _refuse(path, wrong)
    return texts


def _refuse(path: Path, wrong: dict[str, list[int]]) -> None:
    """Raise a DataError when rows are wrong, with their first numbers by what is wrong."""
    if wrong:
        told = "; ".join(f"{_numbered(numbers)}: {what}" for what, numbers in list(wrong.items())[:_KINDS])
        empty = any(what.endswith("is empty") for what in wrong)
        hint = "; correct them, or set data.skip_empty: true to leave them out" if empty else ""
        raise DataError(f"shard {path}, {told}{hint}")


def _numbered(numbers: list[int]) -> str:
    """Which rows: the first numbers, and how many there are."""
    some = ", ".join(map(str, numbers[:_LISTED])) + (", ..." if len(numbers) > _LISTED else "")
    return f"row {some}" if len(numbers) == 1 else f"{len(numbers)} rows (numbers {some})"


def check_columns(
    path: Path, there: list[str], wanted: dict[str, list[str]], *, header: bool, how: str = "separated by commas"
) -> None:
    """Hold the columns of a shard against those that are wanted.

    Args:
        path: the shard, for the error.
        there: its columns.
        wanted: columns by the key or option that names them.
        header: ``there`` is surely no row. The first line of a CSV file without a header is a private one, in which one
            cell may well be a wanted name: without ``header`` it takes two of them before an error may quote it.
        how: the shard was read.

    Raises:
        DataError: a column is missing.
    """
    told = header or len({column for columns in wanted.values() for column in columns} & set(there)) > 1
    for key, columns in wanted.items():
        for column in columns:
            if column in there or column.split(".")[0] in there:
                continue
            near = difflib.get_close_matches(column, there, n=1)
            hint = (f"did you mean {near[0]!r}? " if near else "") + f"columns: {', '.join(there)}"
            if not told:
                hint = f"its first line must hold the column names (read as {how}, it has {len(there)} cells)"
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

    def fill(self, cells: Cells) -> str:
        """Its text for a row; raises ``_Wrong`` when a cell is empty or no text."""
        return "".join(
            literal + ("" if column is None else _text(column, cell(cells, column)))
            for literal, column, _, _ in self._parts
        )


def cell(cells: Cells, column: str) -> object:
    """The cell of a column; of a name with points that is none, what lies at that path in a nested column."""
    if column in cells:
        return cells[column]
    value: object = cells
    for part in column.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(column: str, value: object) -> str:
    """A cell as text, without white space around it; numbers count as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise _Wrong(f"column {column!r} is no text but {type(value).__name__}")
    if value is None or value != value or not str(value).strip():  # NaN differs from itself
        raise _Wrong(f"column {column!r} is empty", empty=True)
    if SURROGATE.search(str(value)):
        raise _Wrong(f"column {column!r} is no text but half of a surrogate pair")
    return str(value).strip()


def _conversation(column: str, turns: object) -> Row:
    """A conversation as a row: the last answer of the assistant, the turn before it, and all before that.

    Turns of other roles than system, user and assistant (tools), and those without text (calls of tools), are left out;
    so is what follows the last answer. Turns of one role that follow each other are joined.
    """
    said: list[tuple[str, str]] = []
    for turn in turns if isinstance(turns, list) else []:
        role, text = _turn(column, turn)
        if not text:
            continue
        if said and said[-1][0] == role:
            text = f"{said.pop()[1]}\n\n{text}"
        said.append((role, text))
    while said and said[-1][0] != "assistant":
        said.pop()
    if not said and (turns is None or isinstance(turns, list)):
        raise _Wrong(f"column {column!r} holds no answer of an assistant; it is empty", empty=True)
    if len(said) < 2 or said[-2][0] != "user":
        raise _Wrong(f"column {column!r} is no conversation of system, user and assistant in that order")
    return Row(said[-2][1], said[-1][1], before=tuple(said[:-2]))


def _turn(column: str, turn: object) -> tuple[str, str]:
    """Role and text of a turn in the form of OpenAI or of ShareGPT; no text where it is to be left out."""
    if not isinstance(turn, dict) or not isinstance(role := turn.get("role", turn.get("from")), str):
        raise _Wrong(f"column {column!r} is no list of turns with `role` and `content`")
    role = _ROLES.get(role.lower(), role.lower())
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # a list of parts; a part that is no text cannot be learned
        content = "\n".join(_text(column, part.get("text") if isinstance(part, dict) else part) for part in content)
    known = role in ("system", "user", "assistant")
    return role, _text(column, content) if known and content not in (None, "") else ""
