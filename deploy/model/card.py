"""Show a finished model's card: ``fedspan model card FOLDER``; every file is held against its digest first."""

import argparse
from pathlib import Path

from common.errors import ModelError
from common.model.card import render
from common.model.finished import README, Finished, digests, read_finished
from common.system.command import Command
from common.system.files import write_atomically


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the model's folder, which holds fedspan.json")
    parser.add_argument("--write", action="store_true", help=f"write the card into the folder as {README}")


def _run(options: argparse.Namespace) -> None:
    finished = read_finished(options.folder)
    check_unchanged(options.folder, finished)
    text = render(finished.card)
    if options.write:
        write_atomically(options.folder / README, text)
        print(f"{options.folder / README} written")  # noqa: T201
    else:
        print(text, end="")  # noqa: T201


def check_unchanged(folder: Path, finished: Finished) -> None:
    """Raise a ModelError that names a file of the folder that is not as it was written: changed, missing or new."""
    found = digests(folder)
    for name in sorted(finished.files.keys() | found.keys()):
        if (now := found.get(name)) != (then := finished.files.get(name)):
            what = "is missing" if now is None else "was not there" if then is None else "has changed"
            raise ModelError(f"{folder / name} {what} since the model was written; digest {now}, then {then}")


CARD = Command(
    _arguments,
    _run,
    example="runs/demo/model",
    then="fedspan model ask runs/demo/model QUESTION",
    notes="Runs here alone; nothing is fetched or sent.",
)
