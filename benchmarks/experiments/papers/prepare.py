"""Rows and sites of the papers' experiments: ``python -m benchmarks.experiments.papers.prepare DATA --from PATH``.

DATA is ``glue`` (a folder that holds SST-2, QNLI, MNLI, QQP and RTE, or some of them), ``medquad``, ``dolly``,
``brain-tumour`` (see ``fedspan data recipe``) or ``commonsense`` (LLM-Adapters' commonsense_170k.json). Writes into
``.cache/papers/TASK``, or below ``--cache``: ``test.jsonl`` and ``validation.jsonl``, and ``N/``, the other rows dealt
out to N sites. Rows are drawn by a hash of their content, the same everywhere.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.experiments.prepare import Row, deal, write
from common.data.shards import Cells, load_cells
from common.errors import DataError, LaunchError
from common.system.command import Command, program
from common.system.files import built
from deploy.data.recipe import RECIPES
from deploy.data.recipes.splits import Splits, by_group

DEFAULT_CACHE = Path(__file__).parents[3] / ".cache" / "papers"
GLUE = {"SST-2": "sst2", "QNLI": "qnli", "MNLI": "mnli", "QQP": "qqp", "RTE": "rte"}
#: Numbers of sites and Dirichlet's alpha over the labels, by data; alike means that the rows are dealt out in turns.
SITES: dict[str, tuple[tuple[int, ...], float | None]] = {
    "glue": ((3, 20, 50), None),
    "medquad": ((3,), None),
    "dolly": ((3,), None),
    "commonsense": ((50,), None),
    "brain-tumour": ((4,), 0.3),
}
_VALIDATION, _MOST_VALIDATION, _TEST = 0.05, 2000, 0.02
_KEY = "_draw"


def prepare(name: str, source: Path, cache: Path) -> list[Path]:
    """Prepare a data set; returns the new folders.

    Raises:
        DataError: the source is not what was expected.
        LaunchError: a folder exists, or cannot be written.
    """
    tasks = (
        {GLUE[folder.name]: folder for folder in sorted(source.iterdir()) if folder.name in GLUE}
        if name == "glue"
        else {name: source}
    )
    if not tasks:
        raise DataError(f"{source} holds none of {', '.join(GLUE)}")
    folders = []
    for task, downloaded in tasks.items():
        folder = cache / task
        if folder.exists():
            raise LaunchError(f"{folder} exists already; remove it, or name another --cache")
        prompt, answer, splits = _splits(task, downloaded)
        try:
            with built(folder) as building:
                _write(building, splits, prompt, answer, *SITES[name])
        except OSError as error:
            raise LaunchError(f"{folder} cannot be written: {error.strerror or error}") from None
        folders.append(folder)
    return folders


def _splits(task: str, source: Path) -> tuple[str, str, Splits]:
    """Prompt, answer, and rows."""
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if task == "commonsense":
        columns, cells = load_cells(source)
        if not {"instruction", "output"} <= set(columns):
            raise DataError(f"{source} has the columns {', '.join(columns)}; expected instruction and output")
        rows = [{"instruction": str(c["instruction"]), "output": str(c["output"])} for c in cells]
        return "instruction", "output", by_group([dict(row) for row in rows], "instruction", _TEST)
    recipe = RECIPES[task]
    assert recipe.read is not None  # all recipes named here read a download
    return recipe.prompt, recipe.answer, recipe.read(source)


def _write(folder: Path, splits: Splits, prompt: str, answer: str, sites: tuple[int, ...], alpha: float | None) -> None:
    rows: list[Row] = [{key: str(value) for key, value in cells.items()} for cells in splits.train]
    group = "focus" if "focus" in rows[0] else next(column for column in rows[0] if column in prompt)
    keyed: list[Cells] = [{**row, _KEY: f"validation of {_of_any_machine(str(row[group]))}"} for row in rows]
    kept = by_group(keyed, _KEY, _VALIDATION)
    train, validation = ([_plain(row) for row in part] for part in (kept.train, kept.test))
    write(folder / "test.jsonl", [_plain(row) for row in splits.test])
    write(folder / "validation.jsonl", validation[:_MOST_VALIDATION])
    for clients in sites:
        deal(folder / str(clients), train, "label", clients, alpha, prompt=prompt, answer=answer)


def _of_any_machine(value: str) -> str:
    """A text, or of an image's absolute path the part that is the same on every machine."""
    return "/".join(Path(value).parts[-2:]) if value.startswith("/") else value


def _plain(cells: Cells) -> Row:
    return {key: str(value) for key, value in cells.items() if key != _KEY}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", choices=list(SITES), metavar="DATA", help=", ".join(SITES))
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DOWNLOADED")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR")


def _run(options: argparse.Namespace) -> None:
    for folder in prepare(options.data, options.source, options.cache):
        counts = {
            split: len((folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
            for split in ("validation", "test")
        }
        print(f"{folder}: {json.dumps(counts)}")


if __name__ == "__main__":
    what = "rows and sites of the papers' experiments"
    command = Command(
        _arguments,
        _run,
        example="medquad --from MedQuAD",
        then="fedspan experiment benchmarks/experiments/papers/fedftg_text.yaml",
        notes="",
    )
    sys.exit(program("python -m benchmarks.experiments.papers.prepare", f"prepare {what}", command))
