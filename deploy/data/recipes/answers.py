"""Prompts and answers: MedQuAD and Dolly-15k."""

from pathlib import Path
from xml.etree import ElementTree

from common.data.shards import Cells, load_cells
from common.errors import DataError
from deploy.data.recipes.splits import Splits, by_group

_TEST = 0.05


def medquad(source: Path) -> Splits:
    """MedQuAD (arXiv 1901.08079): its folder of XML files, or a CSV with ``question`` and ``answer``.

    Columns: question, answer, and of the XML files focus, type and collection. Questions about one focus are on one
    side, 5 % of the focuses as test. Left out: pairs without an answer (three collections are published so).

    Raises:
        DataError: nothing of that kind is there.
    """
    rows: list[Cells] = []
    left_out = 0
    if source.is_dir():
        for file in sorted(source.glob("**/*.xml")):
            for row in _medquad_document(file):
                if row["answer"] and row["question"]:
                    rows.append(row)
                else:
                    left_out += 1
    else:
        columns, cells = load_cells(source)
        if not {"question", "answer"} <= set(columns):
            raise DataError(f"{source} has the columns {', '.join(columns)}; expected question and answer")
        for cell in cells:
            question, answer = (str(cell.get(name) or "").strip() for name in ("question", "answer"))
            if question and answer:
                focus = str(cell.get("focus_area") or question).strip()
                rows.append({"question": question, "answer": answer, "focus": focus})
            else:
                left_out += 1
    if not rows:
        raise DataError(f"{source} holds no question with an answer; expected MedQuAD's folder or a CSV made of it")
    return by_group(rows, "focus", _TEST, left_out)


def _medquad_document(file: Path) -> list[Cells]:
    try:
        root = ElementTree.parse(file).getroot()  # noqa: S314 - the user's own download; expat expands no entities from outside
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is not valid XML: {error}") from None
    focus = " ".join(root.findtext("Focus", "").split())
    rows = []
    for pair in root.iter("QAPair"):
        question = pair.find("Question")
        rows.append(
            {
                "question": " ".join(pair.findtext("Question", "").split()),
                "answer": " ".join(pair.findtext("Answer", "").split()),
                "focus": focus or file.stem,
                "type": question.get("qtype", "") if question is not None else "",
                "collection": file.parent.name,
            }
        )
    return rows


def dolly(source: Path) -> Splits:
    """Dolly-15k (databricks-dolly-15k.jsonl).

    Columns: prompt (the instruction, and under it the context where there is one), response, category. 5 % of the
    prompts as test.

    Raises:
        DataError: the columns are others.
    """
    columns, cells = load_cells(source)
    expected = {"instruction", "context", "response", "category"}
    if not expected <= set(columns):
        raise DataError(f"{source} has the columns {', '.join(columns)}; expected {', '.join(sorted(expected))}")
    rows: list[Cells] = []
    for cell in cells:
        parts = [str(cell.get(name) or "").strip() for name in ("instruction", "context")]
        row = {
            "prompt": "\n\n".join(part for part in parts if part),
            "response": str(cell.get("response") or "").strip(),
            "category": str(cell.get("category") or "").strip(),
        }
        if all(row.values()):
            rows.append(row)
    return by_group(rows, "prompt", _TEST, len(cells) - len(rows))
