"""No docstring, comment or help text of the product has a sentence that begins with "of", "what" or "whom".

Such a sentence is a fragment, or makes its reader wait for the noun that it is about: "Of a site file's section.",
"rows: of the client's shard". It begins with the noun instead: "Section of a site file", "number of rows in the shard".
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("benchmarks", "client", "common", "deploy", "server", "strategies")
#: Where a sentence begins: in the text, after a full stop, or as a line of Args, Attributes or Raises.
BEGINS = re.compile(
    r"^\W*(?:of|what|whom)\b(?!:)|(?<=[.!?] )(?:Of|What|Whom)\b|^ *\w+: (?:of|what|whom)\b", re.I | re.M
)
#: Texts of Python that people read: keywords of ``Field`` and ``add_argument``.
TEXTS = {"description", "help", "notes"}


def _sentences(text: str) -> Iterator[str]:
    """Paragraphs on one line each, and lines of Args by themselves."""
    for paragraph in re.split(r"\n\s*\n|\n(?= *\w+: )", text):
        yield " ".join(paragraph.split())


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, help text and comment; comments that follow each other are one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if (text := ast.get_docstring(node)) is not None:
                yield node.body[0].lineno, text
        elif isinstance(node, ast.keyword) and node.arg in TEXTS and isinstance(node.value, ast.Constant):
            yield node.value.lineno, str(node.value.value)
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            if block and not (alone and token.start[0] == last + 1):
                yield first, " ".join(block)
                block = []
            first = first if block else token.start[0]
            block.append(token.string.lstrip("#: "))
            last = token.start[0] if alone else -1
    if block:
        yield first, " ".join(block)


def fragments(source: str) -> list[str]:
    """Sentences of a file that begin with one of the words, each with its line."""
    found = (
        (line, one, match)
        for line, text in _texts(source)
        for one in _sentences(text)
        for match in BEGINS.finditer(one)
    )
    return [f"line {line}: {one[match.start() :][:80]}" for line, one, match in found]


@pytest.mark.parametrize("room", ROOMS)
def test_no_sentence_begins_with_of_what_or_whom(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    found = [f"{file.relative_to(ROOT)}, {bad}" for file in files for bad in fragments(file.read_text("utf-8"))]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    "source",
    [
        '"""What a site holds."""',
        '"""A site. Of its rows none."""',
        'def f(rows):\n    """Count.\n\n    Args:\n        rows: of the shard.\n    """',
        "x = 1  # of the shard",
        "# A site.\n# What it holds.\nx = 1",
        'Field(description="Of the server: a rate.")',
    ],
)
def test_each_place_is_read(source: str) -> None:
    assert len(fragments(source)) == 1


def test_the_words_may_stand_inside_a_sentence() -> None:
    assert not fragments(
        '"""The rows of a site, whatever it holds: what it trains on. Often few."""\nx = 1  # off by one'
    )
