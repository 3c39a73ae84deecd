"""A shard in any format becomes the same rows; what is wrong is named without quoting a row."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from common.config import DataConfig
from common.errors import DataError
from common.rows import Row, load_rows, split_held_out

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
    return load_rows(config, path.parent / "site.yaml")


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


def test_csv_without_a_header_does_not_quote_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("secret one,secret two\n")
    with pytest.raises(DataError, match="its first line must hold the column names") as caught:
        load(path)
    assert "secret" not in str(caught.value)


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
