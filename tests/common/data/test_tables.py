"""Tables as people have them: any delimiter and encoding, workbooks, folders of parts, conversations, empty cells."""

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

from common.config.section import DataConfig
from common.data.rows import Loaded, Row, load_rows
from common.errors import DataError

ROWS = [("Köhler's disease; left", "007"), ('said "no", twice', "1,5"), ("two\nlines", "NA")]
PAIRS = [(term, code) for term, code in ROWS]


def load(path: Path, prompt: str = "term", answer: str = "code", **options: Any) -> Loaded:
    return load_rows(DataConfig(path=path.name, prompt=prompt, answer=answer, **options), path.parent / "site.yaml")


def pairs(loaded: Loaded) -> list[tuple[str, str]]:
    return [(row.prompt, row.answer) for row in loaded.rows]


def save(path: Path, delimiter: str, encoding: str, end: str = "\r\n") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
        writer.writerows([("term", "code"), *ROWS])
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le"])
def test_delimiter_and_encoding_are_detected_and_told(tmp_path: Path, delimiter: str, encoding: str) -> None:
    loaded = load(save(tmp_path / "rows.csv", delimiter, encoding))
    assert pairs(loaded) == PAIRS
    names = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
    assert loaded.how.startswith(f"CSV, {names[delimiter]} between cells, {encoding.removesuffix('-sig')[:6]}")


def test_delimiter_is_the_one_that_finds_the_wanted_columns(tmp_path: Path) -> None:
    """Even where another one gives rows that are as even."""
    (tmp_path / "rows.csv").write_text("term;a,code;b\nx;1,y;2\nz;3,w;4\n")
    assert pairs(load(tmp_path / "rows.csv", "term", "b")) == [("x", "2"), ("z", "4")]
    assert pairs(load(tmp_path / "rows.csv", "term;a", "code;b")) == [("x;1", "y;2"), ("z;3", "w;4")]


def test_delimiter_and_encoding_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("term#code\nZürich#ß\n".encode("mac-roman"))
    assert pairs(load(tmp_path / "rows.csv", delimiter="#", encoding="mac-roman")) == [("Zürich", "ß")]
    with pytest.raises(DataError, match=r"is not utf-8 \(at byte offset 11\); correct data.encoding"):
        load(tmp_path / "rows.csv", delimiter="#", encoding="utf-8")
    with pytest.raises(ValueError, match="'klingon' is no encoding"):
        load(tmp_path / "rows.csv", encoding="klingon")


def test_excels_own_line_says_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sep=;\r\nterm;code\r\na,b;c\r\n", newline="")
    assert pairs(load(tmp_path / "rows.csv")) == [("a,b", "c")]


def test_jsonl_of_another_program_is_read(tmp_path: Path) -> None:
    text = '{"term": "für", "code": "é"}\n'
    for encoding in ("utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "rows.jsonl").write_bytes(text.encode(encoding))
        assert pairs(load(tmp_path / "rows.jsonl")) == [("für", "é")]


def workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for name, rows in sheets.items():
        page = book.create_sheet(name)
        for row in rows:
            page.append(row)
    book.save(path)
    return path


def test_workbook_is_read_from_the_sheet_that_has_the_columns(tmp_path: Path) -> None:
    day = datetime.datetime(2020, 1, 2)
    table = [["term", "code", "when"], ["a", 7, day], [None, None, None], ["b", "007", None]]
    path = workbook(tmp_path / "rows.xlsx", notes=[["about"], ["secret"]], cases=table)
    loaded = load(path)
    assert (pairs(loaded), loaded.how) == ([("a", "7"), ("b", "007")], "Excel, sheet cases")
    with pytest.raises(DataError, match="row 4: column 'when' is empty"):
        load(path, "term", "when")
    assert pairs(load(path, "term", "when", skip_empty=True)) == [("a", "2020-01-02")]
    with pytest.raises(DataError, match=r"has no sheet 'cages'; name one in data.sheet: notes, cases") as caught:
        load(path, sheet="cages")
    assert "secret" not in str(caught.value)
    both = workbook(tmp_path / "both.xlsx", old=table, new=table[:2])
    with pytest.raises(DataError, match=r"several sheets that could be meant; name one in data.sheet: old, new"):
        load(both)
    assert pairs(load(both, sheet="new")) == [("a", "7")]
    (tmp_path / "rows.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(DataError, match=r"ending '\.xls' is unknown; save it as \.xlsx or CSV"):
        load(tmp_path / "rows.xls")


def hub(folder: Path, **splits: int) -> Path:
    """A folder as the hub has it: Parquet in data/, in parts, with a README."""
    (folder / "hub" / "data").mkdir(parents=True)
    (folder / "hub" / "README.md").write_text("secret")
    (folder / "hub" / ".gitattributes").write_text("secret")
    for split, count in splits.items():
        for part in range(count):
            rows = [{"term": f"{split} {part}", "code": "x"}]
            name = f"{split}-{part:05}-of-{count:05}.parquet"
            parquet.write_table(pa.Table.from_pylist(rows), folder / "hub" / "data" / name)
    return folder / "hub"


def test_folder_of_the_hub_gives_the_parts_of_one_split(tmp_path: Path) -> None:
    path = hub(tmp_path, train=2, validation=1)
    loaded = load(path, split="train")
    assert pairs(loaded) == [("train 0", "x"), ("train 1", "x")]
    assert loaded.how == "Parquet, 2 file(s) of split train"
    with pytest.raises(DataError, match=r"holds several splits; name one in data.split: train, validation"):
        load(path)
    with pytest.raises(DataError, match=r"has no split 'test'; name one in data.split: train, validation"):
        load(path, split="test")
    (path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of 2 parts are there"):
        load(path, split="train")


def test_folder_of_parts_is_one_table_whatever_its_format(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save(tmp_path / "parts" / "part-0.csv", ";", "utf-8")
    save(tmp_path / "parts" / "part-1.csv", ";", "utf-8")
    assert pairs(load(tmp_path / "parts")) == PAIRS * 2
    (tmp_path / "parts" / "more.jsonl").write_text('{"term": "a", "code": "b"}')
    with pytest.raises(DataError, match=r"tables of several formats; name one in data.format: jsonl, csv"):
        load(tmp_path / "parts")
    assert pairs(load(tmp_path / "parts", format="jsonl")) == [("a", "b")]
    (tmp_path / "parts" / "part-1.csv").write_text("other\nx\n")
    with pytest.raises(DataError, match=r"part-1\.csv has other columns than part-0\.csv"):
        load(tmp_path / "parts", format="csv")


def test_saved_splits_are_chosen_by_name(tmp_path: Path) -> None:
    made = {name: datasets.Dataset.from_list([{"term": name, "code": "x"}]) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    assert pairs(load(tmp_path / "saved", split="test")) == [("test", "x")]
    with pytest.raises(DataError, match=r"holds several splits; name one in data.split: train, test"):
        load(tmp_path / "saved")
    (tmp_path / "rows.csv").write_text("term,code\na,b\n")
    with pytest.raises(DataError, match=r"data.split is 'train', but shard .* has no splits"):
        load(tmp_path / "rows.csv", split="train")


def test_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="is a Git-LFS pointer, not the data itself"):
        load(tmp_path / "rows.csv")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nested_columns_are_named_by_their_path(tmp_path: Path, kind: str) -> None:
    rows = [{"a": {"b": "x", "c": {"d": [f"y{i}", "z"]}}, "a.e": "whole", "code": "k"} for i in range(2)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    assert pairs(load(path, "{a.b} {a.c.d.0} {a.e}", "code")) == [("x y0 whole", "k"), ("x y1 whole", "k")]
    with pytest.raises(DataError, match=r"2 rows \(numbers 1, 2\): column 'a.f' is empty"):
        load(path, "a.f", "code")


def test_wrong_rows_are_told_together_by_their_numbers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"term": "secret", "code": None if i % 2 else "x"} for i in range(20)]
    rows[4]["code"] = ["secret"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        load(tmp_path / "rows.jsonl")
    assert str(caught.value).partition("rows.jsonl, ")[2] == (
        "10 rows (numbers 2, 4, 6, 8, 10, ...): column 'code' is empty; row 5: column 'code' is no text but list; "
        "correct them, or set data.skip_empty: true to leave them out"
    )
    rows[4]["code"] = "x"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load(tmp_path / "rows.jsonl", skip_empty=True)
    assert (len(loaded.rows), loaded.left_out) == (10, 10)


def chat(folder: Path, *conversations: Any) -> list[Row]:
    lines = [json.dumps({"messages": turns}) for turns in conversations]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return load_rows(DataConfig(path="rows.jsonl", messages="messages"), folder / "site.yaml").rows


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_conversation_becomes_its_last_answer_and_what_came_before(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    whole = Row("u2", "a2", before=tuple(turns[:3]))
    plain = [turn(role, text) for role, text in turns]
    calling = [
        *plain[:4],
        turn("assistant", None, tool_calls=[{"id": "1"}]),
        turn("tool", "secret"),
        plain[4],
        turn("user", "bye"),
    ]
    in_parts = [turn(t["role"], [{"type": "text", "text": t["content"]}]) for t in plain]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[role], "value": text} for role, text in turns]
    assert chat(tmp_path, plain, calling, in_parts, shared) == [whole] * 4
    assert chat(tmp_path, [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]) == [Row("a\n\nb", "c")]


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([turn("user", "secret")], "holds no answer of an assistant; it is empty"),
        ([turn("assistant", "secret")], "is no conversation of system, user and assistant in that order"),
        ("secret", "is no conversation|is no list of turns"),
        (["secret"], "is no list of turns with `role` and `content`"),
        ([turn("user", [{"type": "image_url"}]), turn("assistant", "secret")], "is empty"),
    ],
)
def test_what_is_no_conversation_is_named_and_not_quoted(tmp_path: Path, turns: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"row 1: column 'messages' ({says})") as caught:
        chat(tmp_path, turns)
    assert "secret" not in str(caught.value)


def test_conversations_that_differ_early_are_different_rows() -> None:
    rows = [Row("u", "a", before=(("user", text), ("assistant", "x"))) for text in ("p", "q")]
    assert len({row.key() for row in rows} | {Row("u", "a").key()}) == 3
