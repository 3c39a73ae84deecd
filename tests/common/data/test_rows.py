"""A shard in any format becomes the same rows; what is wrong is named without quoting a row."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from common.config.section import DataConfig
from common.data.rows import Row, load_rows, split_held_out
from common.data.shards import load_cells
from common.errors import DataError

RECORDS = [
    {"term": "Köhler's disease", "code": "007", "year": 2019},
    {"term": 'quoted "NA", comma', "code": "NA", "year": 2020},
    {"term": "two\nlines", "code": "1e5", "year": 2021},
]


def write(folder: Path, kind: str) -> Path:
    path = folder / ("rows" if kind == "dataset" else f"rows.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in RECORDS))
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind == "csv":
        lines = ['"' + '","'.join(str(v).replace('"', '""') for v in r.values()) + '"' for r in RECORDS]
        path.write_text("\ufeffterm,code,year\n" + "\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
    return path


def load(path: Path, prompt: str = "term", answer: str = "code", **options: object) -> list[Row]:
    config = DataConfig(path=path.name, prompt=prompt, answer=answer, **options)  # type: ignore[arg-type]
    return load_rows(config, path.parent / "site.yaml").rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "dataset"])
def test_every_format_gives_the_same_rows_with_cells_as_they_are(tmp_path: Path, kind: str) -> None:
    rows = load(write(tmp_path, kind), prompt="Term: {term} ({year})")
    assert [(r.prompt, r.answer) for r in rows] == [(f"Term: {r['term']} ({r['year']})", r["code"]) for r in RECORDS]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty|has no rows"),
        ('{"term": "secret", "code": null}\n', r"row 1: column 'code' is empty"),
        (
            '{"term": "secret", "code": "x"}\n{"term": "secret", "code": ["secret"]}\n',
            r"row 2: column 'code' is no text",
        ),
        ('{"term": "secret", "code": true}\n', r"row 1: column 'code' is no text but bool"),
        ('{"term": "secret", "code": "  "}\n', r"row 1: column 'code' is empty"),
        ('{"term": "secret"}\n', r"data.answer: shard .* has no column 'code'; columns: term"),
        ('{"term": "secret", "codes": "x"}\n', r"has no column 'code'; did you mean 'codes'\? columns: term, codes"),
        ('{"term": "secret"\n', r"line 1: not valid JSON"),
        ('["secret"]\n', r"row 1: must be a JSON object, is str"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named_and_no_row_is_quoted(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("first", ["secret one,secret two,secret", "secret,terms,secret", "secret,term,secret"])
def test_csv_without_a_header_does_not_quote_its_first_row(tmp_path: Path, first: str) -> None:
    """Not even when one of its cells is a wanted name, or near to one."""
    path = tmp_path / "rows.csv"
    path.write_text(f"{first}\nsecret,x,y\n")
    with pytest.raises(DataError, match=r"column '(term|code)'; its first line must hold the column") as caught:
        load(path)
    assert "secret" not in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_csv_with_two_wanted_names_in_its_first_line_has_its_columns_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("term,codes,year\n")
    with pytest.raises(DataError, match=r"has no column 'code'; did you mean 'codes'\? columns: term, codes, year"):
        load(path, prompt="{term} {year}")


CELL = "x" * 200_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'term,code\nsecret,b\n"two\nlines","secret"c\n', r"line 4: not valid CSV \(',' expected after '\"'\)"),
        (b'term,code\nsecret,b\nc,"secret\nsecret', r"line 4: not valid CSV \(unexpected end of data\)"),
        (b"term,code\na,b\na,secret,c\n", "row 2: has more cells than the first line"),
        (b"term,code\na,b\n\nsecret\n", "row 2: column 'code' is empty"),
        (b"term,code,year,term\nsecret,b,c,d\n", "columns 1 and 4 are both named 'term'; rename or delete one"),
        (f"term,code\n{CELL},\x81\n".encode("latin-1"), r"is not UTF-8 \(at byte offset 200011\)"),
        (b"\xef\xbb\xbfterm,code\n\xe4,secret\n", r"is not UTF-8 \(at byte offset 13\)"),
        ("term,code\nsecret,süß\n".encode("cp850"), r"not clearly cp1252; name its encoding in data.encoding"),
        ("term,code\nsecret,боль в руке\n".encode("cp1251"), r"not clearly cp1252"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_named_and_no_row_is_quoted(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_columns_of_one_name_matter_only_where_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("term,code,secret,secret,,\na,b,c,d,,\n")
    assert [(row.prompt, row.answer) for row in load(path)] == [("a", "b")]
    with pytest.raises(DataError, match="columns 3 and 4 have one name") as caught:
        load_cells(path)
    assert "secret" not in str(caught.value)


def test_cell_of_csv_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"term,code\n{CELL},b\n")
    assert [row.prompt for row in load(path)] == [CELL]


def test_line_ends_of_other_systems_make_the_same_rows(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "rows.csv").write_bytes(f"term,code{end}a,b{end}".encode())
        (tmp_path / "rows.jsonl").write_bytes(f'{{"term": "a", "code": "b"}}{end}{end}'.encode() * 2)
        assert [(r.prompt, r.answer) for r in load(tmp_path / "rows.csv")] == [("a", "b")]
        assert [(r.prompt, r.answer) for r in load(tmp_path / "rows.jsonl")] == [("a", "b")] * 2


@pytest.mark.parametrize("cell", [r'"secret \ud83d"', r'["secret \ud83d"]', r'{"x": {"secret \ud83d": 1}}'])
def test_half_a_character_is_refused_before_anything_is_made_of_the_rows(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"term": "whole \\ud83d\\ude00"}}\n\n{{"term": {cell}}}\n')
    with pytest.raises(DataError, match=r"row 3: column 'term' is no text but half of a surrogate pair") as caught:
        load_cells(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def scans(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / "scans" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "scans" / file).write_bytes(b"x")
    return folder / "scans"


def images(path: Path) -> list[tuple[str, str]]:
    return [(Path(row.prompt).relative_to(path).as_posix(), row.answer) for row in load(path, "image", "label")]


def test_every_file_of_a_label_counts_as_an_image(tmp_path: Path) -> None:
    path = scans(tmp_path, "b/1.jfif", "b/IM0001", "a/x/y/2.dcm", "a/x-1.PNG", "notes.txt")
    scans(tmp_path, ".DS_Store", "a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", ".cache/1.png", "b/.cache/1.png")
    (path / "b" / "gone.png").symlink_to("nowhere.png")
    (path / "b" / "more").symlink_to(path / "a")
    os.mkfifo(path / "b" / "pipe.png")
    elsewhere = scans(tmp_path / "elsewhere", "c/3.png") / "c"
    (path / "c").symlink_to(elsewhere)
    assert images(path) == [
        *[("a/x/y/2.dcm", "a"), ("a/x-1.PNG", "a")],
        *[("b/1.jfif", "b"), ("b/IM0001", "b"), ("b/gone.png", "b"), ("b/more", "b")],
        ("c/3.png", "c"),
    ]


def test_images_beside_the_folders_of_labels_are_refused(tmp_path: Path) -> None:
    path = scans(tmp_path, "a/1.png", "secret-2.JPG", "secret-3.tif", "labels.csv")
    with pytest.raises(DataError, match=r"scans: 2 image\(s\) beside the labels' folders; move each into") as caught:
        load(path, "image", "label")
    assert "secret" not in str(caught.value)


def test_folder_of_a_label_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    path = scans(tmp_path, "a/1.png")
    (path / "b").symlink_to(tmp_path / "not mounted")
    with pytest.raises(DataError, match=r"folder .*scans/b cannot be listed \(No such file or directory\)"):
        load(path, "image", "label")


@pytest.mark.parametrize(
    ("closed", "says"),
    [
        ("", r"^folder \S*/scans cannot be listed \(Permission denied\)"),
        ("b", r"^folder \S*/scans/b cannot be listed \(Permission denied\)"),
        ("b/secret", r"^a folder below \S*/scans/b, which the log of this machine names, cannot be listed"),
    ],
)
def test_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed: str, says: str
) -> None:
    path = scans(tmp_path, "a/1.png", "b/2.png", "b/secret/3.png")
    listing = os.scandir

    def scandir(folder: Path) -> Iterator[os.DirEntry[str]]:
        """The file system's, also for root."""
        if folder == path / closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=says) as caught:
        load(path, "image", "label")
    assert "secret" not in str(caught.value)
    assert f"folder {path / closed} cannot be listed" in caplog.text


def test_damaged_file_is_named_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"secret")
    with pytest.raises(DataError, match=r"is not readable as parquet \(\w+\)") as caught:
        load(path)
    assert "secret" not in str(caught.value)


def test_missing_shard_and_unknown_ending_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard .*absent\.jsonl does not exist"):
        load(tmp_path / "absent.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match=r"ending '\.txt' is unknown; name it in data\.format"):
        load(tmp_path / "rows.txt")


def test_classes_of_datasets_and_parquet_are_read_by_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        term=datasets.Value("string"), code=datasets.ClassLabel(names=["ham", "spam"]), year=datasets.Value("int64")
    )
    rows = [{"term": f"t{i}", "code": i % 2, "year": i} for i in range(4)]
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        assert [(row.prompt, row.answer) for row in load(tmp_path / name)] == [
            (f"t{i}", ["ham", "spam"][i % 2]) for i in range(4)
        ]
    none = datasets.Dataset.from_list([{**rows[0], "code": -1}], features=features)
    none.to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="row 1: column 'code' is empty"):
        load(tmp_path / "none.parquet")


def test_link_is_known_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "store" / "ab").mkdir(parents=True)
    write(tmp_path, "jsonl").rename(tmp_path / "store" / "ab" / "3f9c01")
    (tmp_path / "rows.jsonl").symlink_to("store/ab/3f9c01")
    assert len(load(tmp_path / "rows.jsonl")) == 3
    (tmp_path / "store" / "ab" / "3f9c01").write_text("{")
    with pytest.raises(DataError, match=r"shard \S*/rows\.jsonl, line 1: not valid JSON"):
        load(tmp_path / "rows.jsonl")


def test_rows_have_no_readable_repr() -> None:
    assert "secret" not in repr(Row("secret", "secret"))


def test_side_of_a_row_depends_on_its_content_alone() -> None:
    rows = [Row(f"prompt {i}", f"answer {i}") for i in range(400)]
    train, held_out = split_held_out(rows, 0.25)
    assert 60 < len(held_out) < 140
    more_train, more_held_out = split_held_out([Row("new", "row"), *reversed(rows)], 0.25)
    assert {r.key() for r in train} <= {r.key() for r in more_train}
    assert {r.key() for r in held_out} <= {r.key() for r in more_held_out}


def test_share_that_leaves_nothing_to_train_is_refused() -> None:
    row = next(r for r in (Row("p", str(i)) for i in range(100)) if split_or_none(r))
    with pytest.raises(DataError, match=r"held_out 0\.999 leaves none of the shard's 1 rows for training"):
        split_held_out([row], 0.999)


def split_or_none(row: Row) -> bool:
    """Whether a row is among the lowest 99.9 %."""
    return int(row.key()[:13], 16) / 16**13 < 0.999
