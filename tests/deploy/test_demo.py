"""The demo's data: three departments that share no answer, and a server's set from categories that no site has."""

from pathlib import Path

import pytest

from common.errors import DataError, LaunchError
from deploy.demo import icd
from deploy.demo.prepare import MANIFEST, SOURCES, is_complete, prepare

XML = """<root>{chapters}</root>"""


def tabular(folder: Path) -> Path:
    """Chapters 1 to 22 of 12 categories with two codes each; every third term repeats its description."""
    chapters = []
    for chapter in range(1, 23):
        codes = ""
        for category in range(12):
            for code in range(2):
                name = f"{chr(64 + chapter)}{category:02d}.{code}"
                term = f"Title {name}." if (category + code) % 3 == 0 else f"Term of {name}"
                codes += f"<diag><name>{name}</name><desc>Title {name}</desc>"
                codes += f"<inclusionTerm><note>{term}</note></inclusionTerm></diag>"
        chapters.append(f"<chapter><name>{chapter}</name>{codes}</chapter>")
    file = folder / "tabular.xml"
    file.write_text(XML.format(chapters="".join(chapters)))
    return file


def test_terms_that_repeat_their_description_are_left_out(tmp_path: Path) -> None:
    entries = icd.read_entries(tabular(tmp_path))
    assert len(entries) == 22 * 16
    assert all(entry.term.startswith("Term of") for entry in entries)


def test_sites_hold_their_chapters_and_share_nothing_with_the_server(tmp_path: Path) -> None:
    entries = icd.read_entries(tabular(tmp_path))
    shards = icd.split(entries)
    assert set(shards) == {"site-a", "site-b", "site-c", "server"}
    for site, chapters in icd.DEPARTMENTS.items():
        assert {entry.chapter for entry in shards[site]} == set(chapters)
    assert sorted(c for chapters in icd.DEPARTMENTS.values() for c in chapters) == list(range(1, 23))
    assert len(shards["server"]) == 22 * icd.SERVER_ROWS_PER_CHAPTER
    taken = {entry.category for entry in shards["server"]}
    assert not taken & {entry.category for site in icd.DEPARTMENTS for entry in shards[site]}
    titles = [entry.code_title for shard in shards.values() for entry in shard]
    assert len(titles) == len(set(titles))
    assert icd.split(entries) == shards


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.xml"
    file.write_text("<root/>")
    with pytest.raises(DataError, match="holds no chapter with inclusion terms"):
        icd.read_entries(file)
    file.write_text("<root")
    with pytest.raises(DataError, match="is not valid XML"):
        icd.read_entries(file)


def test_cache_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(LaunchError, match="exists and was not made by this command"):
        prepare(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letters.txt"]
    assert not is_complete(tmp_path, SOURCES)


def test_cache_with_a_changed_file_is_not_complete(tmp_path: Path) -> None:
    import json

    from deploy.demo.prepare import _manifest

    (tmp_path / "a").write_text("1")
    (tmp_path / MANIFEST).write_text(json.dumps(_manifest(tmp_path, SOURCES)))
    (tmp_path / "site-a-ledger.jsonl").write_text("{}\n")  # a site's own: nobody makes the cache anew for it
    assert is_complete(tmp_path, SOURCES)
    (tmp_path / "a").write_text("2")
    assert not is_complete(tmp_path, SOURCES)
