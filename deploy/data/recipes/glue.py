"""Six tasks of GLUE (arXiv 1804.07461), from its TSV files or from the hub's Parquet files.

Columns: ``first``, of tasks on pairs also ``second``, and ``label`` as a word. GLUE's development set is the test set,
because the labels of its own test sets are not public; of MNLI it is the matched one.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from common.data.shards import Cells, load_cells
from common.errors import DataError
from deploy.data.recipes.splits import Splits


@dataclass(frozen=True)
class Task:
    """Columns of texts and label in TSV and Parquet, words for labels 0, 1, ..., and the development set's name."""

    tsv: tuple[str, ...]
    parquet: tuple[str, ...]
    labels: tuple[str, ...]
    tsv_label: str = "label"
    dev: str = "dev"
    validation: str = "validation"


_ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "sst2": Task(("sentence",), ("sentence",), ("negative", "positive")),
    "mrpc": Task(
        ("#1 String", "#2 String"), ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), tsv_label="Quality"
    ),
    "qqp": Task(
        ("question1", "question2"),
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        tsv_label="is_duplicate",
    ),
    "mnli": Task(
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        tsv_label="gold_label",
        dev="dev_matched",
        validation="validation_matched",
    ),
    "qnli": Task(("question", "sentence"), ("question", "sentence"), _ENTAILS),
    "rte": Task(("sentence1", "sentence2"), ("sentence1", "sentence2"), _ENTAILS),
}


def read(name: str, source: Path) -> Splits:
    """A task's folder: ``train.tsv`` and ``dev.tsv``, or ``train-*.parquet`` and ``validation-*.parquet``.

    Left out: rows with a missing text, or a label that is none (MNLI's "-").

    Raises:
        DataError: names the file or column that is missing.
    """
    task = TASKS[name]
    if (source / "train.tsv").is_file():
        texts, label = task.tsv, task.tsv_label
        parts = [_tsv(source / f"{split}.tsv", [*texts, label]) for split in ("train", task.dev)]
    else:
        texts, label = task.parquet, "label"
        parts = [_parquet(source, split, [*texts, label]) for split in ("train", task.validation)]
    made = [[row for cells in part if (row := _row(task, cells, texts, label))] for part in parts]
    return Splits(made[0], made[1], sum(map(len, parts)) - sum(map(len, made)))


def _row(task: Task, cells: Cells, texts: tuple[str, ...], label: str) -> Cells | None:
    value = str(cells[label] if cells[label] is not None else "").strip()
    if value.isdigit() and int(value) < len(task.labels):
        value = task.labels[int(value)]
    found = [str(cells[column] or "").strip() for column in texts]
    if value not in task.labels or not all(found):
        return None
    return {**dict(zip(("first", "second"), found, strict=False)), "label": value}


def _tsv(file: Path, wanted: list[str]) -> list[Cells]:
    """GLUE's files quote nothing."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            _check(file, list(reader.fieldnames or []), wanted)
            return list(reader)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} is not readable as TSV ({type(error).__name__})") from None


def _parquet(source: Path, split: str, wanted: list[str]) -> list[Cells]:
    files = sorted(source.glob(f"{split}-*.parquet")) or sorted(source.glob(f"{split}.parquet"))
    if not files:
        raise DataError(f"{source} holds neither train.tsv nor {split}-*.parquet")
    rows: list[Cells] = []
    for file in files:
        columns, cells = load_cells(file)
        _check(file, columns, wanted)
        rows += cells
    return rows


def _check(file: Path, columns: list[str], wanted: list[str]) -> None:
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise DataError(f"{file} has no column {missing[0]!r}; columns: {', '.join(columns)}")
