"""Clinical coding as a task: an inclusion term of ICD-10-CM in, the official description of its code out.

One row per description, so that no answer stands on two sides. The server's evaluation set has whole three-character
categories to itself (all of M02, not just M02.33), because the codes of one category differ by a word.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from common.errors import DataError

#: Chapters of ICD-10-CM by the department that codes them: a hospital's natural, unequal, non-IID split.
DEPARTMENTS: dict[str, tuple[int, ...]] = {
    "site-a": (1, 2, 3, 4, 9, 10, 11, 14),  # internal medicine: infections, neoplasms, blood, metabolism, heart ...
    "site-b": (5, 6, 7, 8, 12, 13, 19, 20),  # neurology, orthopaedics and trauma: nerves, senses, bones, injuries
    "site-c": (15, 16, 17, 18, 21, 22),  # women's and children's health: pregnancy, newborns, malformations, check-ups
}
SERVER_ROWS_PER_CHAPTER = 8


@dataclass(frozen=True)
class Entry:
    """One row of the task; ``chapter`` is 1 to 22."""

    term: str
    code_title: str
    code: str
    chapter: int

    @property
    def category(self) -> str:
        """E.g. M02 of M02.33."""
        return self.code.partition(".")[0]


def read_entries(xml: Path) -> list[Entry]:
    """The first usable inclusion term of every described code, in the order of the classification.

    Left out: terms that repeat their description but for case and punctuation, terms that only point to other codes,
    and any term or description that occurred before, as either.

    Raises:
        DataError: the file is not ICD-10-CM's tabular list.
    """
    try:
        chapters = list(ElementTree.parse(xml).getroot().iter("chapter"))  # noqa: S314 - from a wheel with a known hash
    except ElementTree.ParseError as error:
        raise DataError(f"{xml} is not valid XML: {error}") from None
    seen: set[str] = set()
    entries = []
    for chapter in chapters:
        number = int(chapter.findtext("name", "0"))
        for diagnosis in chapter.iter("diag"):
            title = diagnosis.findtext("desc", "").strip()
            terms = [(note.text or "").strip() for note in diagnosis.findall("inclusionTerm/note")]
            fresh = [term for term in terms if _usable(term, title) and _plain(term) not in seen]
            if fresh and _plain(title) not in seen:
                seen |= {_plain(fresh[0]), _plain(title)}
                entries.append(Entry(fresh[0], title, diagnosis.findtext("name", ""), number))
    if not entries:
        raise DataError(f"{xml} holds no chapter with inclusion terms; is it ICD-10-CM's tabular list?")
    return entries


def split(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Rows by file stem: the sites' shards and ``server``, which shares no category with any of them.

    The server's rows are drawn evenly: from every chapter the first row of ``SERVER_ROWS_PER_CHAPTER`` categories in a
    stable pseudo-random order. The other rows of these categories are left out.
    """
    first_rows: dict[str, Entry] = {}
    for entry in entries:
        first_rows.setdefault(entry.category, entry)
    server: list[Entry] = []
    for chapter in sorted({entry.chapter for entry in entries}):
        drawn = sorted((entry for entry in first_rows.values() if entry.chapter == chapter), key=_draw)
        server += drawn[:SERVER_ROWS_PER_CHAPTER]
    taken = {entry.category for entry in server}
    shards = {
        site: [entry for entry in entries if entry.chapter in chapters and entry.category not in taken]
        for site, chapters in DEPARTMENTS.items()
    }
    return {**shards, "server": server}


def write(shards: dict[str, list[Entry]], folder: Path) -> None:
    """One JSONL file per shard."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in shards.items():
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in entries]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw(entry: Entry) -> str:
    """A pseudo-random key of the category that is the same everywhere."""
    return hashlib.sha256(entry.category.encode()).hexdigest()


def _usable(term: str, title: str) -> bool:
    return bool(term) and _plain(term) != _plain(title) and not term.startswith("Conditions classifiable to")


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
