"""Every recipe on a tiny download of the published schema: rows, splits, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from common.config.section import DataConfig
from common.data.rows import load_rows
from common.errors import DataError
from deploy.data.recipe import RECIPES, make
from deploy.data.recipes import mnist, packaged
from tests.harness.tiny_images import make_images

MEDQUAD = """<?xml version="1.0" encoding="UTF-8"?>
<Document id="{n}_1" source="CancerGov" url="https://example.org"><Focus>Disease {n}</Focus>
<FocusAnnotations><UMLS><CUIs><CUI>C1</CUI></CUIs></UMLS></FocusAnnotations>
<QAPairs>
<QAPair pid="1"><Question qid="{n}_1-1" qtype="information">What is (are)
 Disease {n} ?</Question><Answer>Key Points
        - It is number {n}.</Answer></QAPair>
<QAPair pid="2"><Question qid="{n}_1-2" qtype="symptoms">What are its signs ?</Question><Answer></Answer></QAPair>
<QAPair pid="3"><Question qid="{n}_1-3" qtype="treatment">How to treat it ?</Question><Answer>Rest.</Answer></QAPair>
</QAPairs></Document>
"""


def medquad(folder: Path) -> Path:
    (folder / "MedQuAD" / "1_CancerGov_QA").mkdir(parents=True)
    for n in range(80):
        (folder / "MedQuAD" / "1_CancerGov_QA" / f"{n}_1.xml").write_text(MEDQUAD.format(n=n))
    return folder / "MedQuAD"


def dolly(folder: Path) -> Path:
    file = folder / "databricks-dolly-15k.jsonl"
    rows = [
        {"instruction": f"Ask {n}", "context": "" if n % 2 else "Given", "response": f"Say {n}", "category": "open_qa"}
        for n in range(100)
    ]
    file.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "instruction": "Silent", "response": " "}])))
    return file


HEADERS = {
    "sst2": ("sentence\tlabel", 'a "fine film\t1', "dull\t0"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tOne\tTwo", "0\t7\t8\tOne\tThree"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tOne?\tTwo?\t0", "1\t3\t4\tOne?\tUno?\t1"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1\tx\t()\t()\t()\t()\tOne\tTwo\tneutral\tneutral",
        "0\t1\t1\tx\t()\t()\t()\t()\tOne\tThree\tentailment\tentailment",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWhy?\tSo\tentailment", "1\tWhy?\tNo\tnot_entailment"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tOne\tTwo\tnot_entailment", "1\tOne\tOne\tentailment"),
}
PARQUET: dict[str, list[dict[str, Any]]] = {
    "sst2": [{"sentence": 'a "fine film ', "label": 1, "idx": 0}, {"sentence": "dull ", "label": 0, "idx": 1}],
    "mrpc": [
        {"sentence1": "One", "sentence2": "Two", "label": 1, "idx": 0},
        {"sentence1": "One", "sentence2": "Three", "label": 0, "idx": 1},
    ],
    "qqp": [
        {"question1": "One?", "question2": "Two?", "label": 0, "idx": 0},
        {"question1": "One?", "question2": "Uno?", "label": 1, "idx": 1},
    ],
    "mnli": [
        {"premise": "One", "hypothesis": "Two", "label": 1, "idx": 0},
        {"premise": "One", "hypothesis": "Three", "label": 0, "idx": 1},
    ],
    "qnli": [
        {"question": "Why?", "sentence": "So", "label": 0, "idx": 0},
        {"question": "Why?", "sentence": "No", "label": 1, "idx": 1},
    ],
    "rte": [
        {"sentence1": "One", "sentence2": "Two", "label": 1, "idx": 0},
        {"sentence1": "One", "sentence2": "One", "label": 0, "idx": 1},
    ],
}


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def usable(out: Path) -> list[tuple[str, str]]:
    """The training rows as a site reads them with the columns that the recipe names."""
    data = json.loads((out / "recipe.json").read_text())["data"]
    rows = load_rows(DataConfig(path="train.jsonl", **data), out / "site.yaml").rows
    return [(row.prompt, row.answer) for row in rows]


def test_medquad_keeps_a_focus_on_one_side_and_leaves_out_what_has_no_answer(tmp_path: Path) -> None:
    said = make("medquad", medquad(tmp_path), tmp_path / "out")
    train, test = read(tmp_path / "out" / "train.jsonl"), read(tmp_path / "out" / "test.jsonl")
    assert len(train) + len(test) == 160
    assert "80 left out" in said
    assert not {row["focus"] for row in train} & {row["focus"] for row in test}
    first = next(row for row in [*train, *test] if row["focus"] == "Disease 0")
    assert first == {
        "question": "What is (are) Disease 0 ?",
        "answer": "Key Points - It is number 0.",
        "focus": "Disease 0",
        "type": "information",
        "collection": "1_CancerGov_QA",
    }
    assert len(usable(tmp_path / "out")) == len(train)


def test_medquad_as_a_table(tmp_path: Path) -> None:
    file = tmp_path / "medquad.csv"
    lines = [f'"What is {n}?","Number, {n}",NIH,Disease {n}' for n in range(80)]
    file.write_text("question,answer,source,focus_area\n" + "\n".join([*lines, '"Why?","",NIH,x']))
    assert "1 left out" in make("medquad", file, tmp_path / "out")
    assert len(read(tmp_path / "out" / "train.jsonl")) + len(read(tmp_path / "out" / "test.jsonl")) == 80


def test_dolly_puts_the_context_under_the_instruction(tmp_path: Path) -> None:
    make("dolly", dolly(tmp_path), tmp_path / "out")
    rows = usable(tmp_path / "out")
    assert ("Ask 1", "Say 1") in rows
    assert ("Ask 2\n\nGiven", "Say 2") in rows
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["rows"]["left_out"] == 1


def test_half_a_character_is_refused_with_its_row_and_nothing_is_left(tmp_path: Path) -> None:
    file = dolly(tmp_path)
    row = {"instruction": "secret \ud83d", "context": "", "response": "x", "category": "open_qa"}
    file.write_text(file.read_text() + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=r"jsonl, row 102: column 'instruction' is no text but half of") as caught:
        make("dolly", file, tmp_path / "out")
    assert "secret" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", HEADERS)
def test_glue_is_the_same_from_tsv_and_parquet(tmp_path: Path, name: str) -> None:
    tsv, hub = tmp_path / "tsv", tmp_path / "hub"
    tsv.mkdir()
    hub.mkdir()
    matched = "_matched" if name == "mnli" else ""
    for split in ("train", f"dev{matched}"):
        (tsv / f"{split}.tsv").write_text("\n".join(HEADERS[name]) + "\n")
    for split in ("train", f"validation{matched}"):
        parquet.write_table(pa.Table.from_pylist(PARQUET[name]), hub / f"{split}-00000-of-00001.parquet")
    for source in (tsv, hub):
        make(name, source, tmp_path / f"{source.name}-out")
    rows = usable(tmp_path / "tsv-out")
    assert rows == usable(tmp_path / "hub-out")
    assert len(rows) == 2
    labels = json.loads((tmp_path / "tsv-out" / "recipe.json").read_text())["labels"]
    assert set(labels) == {label for _, label in rows}


def test_glue_leaves_out_rows_without_a_label(tmp_path: Path) -> None:
    header, row, other = HEADERS["mnli"]
    for split in ("train", "dev_matched"):
        (tmp_path / f"{split}.tsv").write_text("\n".join([header, row, other, row.removesuffix("neutral") + "-"]))
    assert "2 left out" in make("mnli", tmp_path, tmp_path / "out")


def test_brain_tumour_images_are_named_where_they_are(tmp_path: Path) -> None:
    make_images(tmp_path / "mri" / "Training", 2, 0)
    make_images(tmp_path / "mri" / "Testing", 1, 1)
    make("brain-tumour", tmp_path / "mri", tmp_path / "out")
    rows = usable(tmp_path / "out")
    assert len(rows) == 6
    assert all(Path(image).is_file() and Path(image).parent.name == label for image, label in rows)
    (tmp_path / "mri" / "Testing" / "red").rename(tmp_path / "mri" / "Testing" / "pink")
    with pytest.raises(DataError, match="classes differ"):
        make("brain-tumour", tmp_path / "mri", tmp_path / "other")


def test_movie_reviews_are_the_sentences_with_words_as_labels(tmp_path: Path) -> None:
    file = tmp_path / "combined.csv"
    lines = [f'"fine, {n}",1,rotten_tomatoes\ndull {n},0,rotten_tomatoes\nlong {n},0,imdb' for n in range(60)]
    file.write_text("text,label,source\n" + "\n".join(lines))
    made = packaged.read_reviews(file)
    assert len(made.train) + len(made.test) == 120
    assert {"text": "fine, 3", "label": "positive"} in [*made.train, *made.test]
    file.write_text("text,label\nx,1\n")
    with pytest.raises(DataError, match="is not the package's table"):
        packaged.read_reviews(file)


def test_another_package_than_the_known_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / mnist.FILE).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected 3fb5bb11"):
        mnist.digits(tmp_path)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.read is not None])
def test_other_files_are_refused_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(DataError):
        make(name, source, tmp_path / "out")
    (source / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError):
        make(name, source / "rows.csv", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
