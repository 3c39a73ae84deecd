"""Readmit a site that rejected updates or errors in a row have put into quarantine: ``fedspan readmit NAME SITE``."""

import argparse
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.config.section import Name
from common.errors import ConfigError
from common.system.command import Command
from server.run.quarantine import FOLDER


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the run")
    parser.add_argument("site", metavar="SITE", help="name of the site, as `fedspan status NAME` shows it")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )


def _run(options: argparse.Namespace) -> None:
    try:
        site = TypeAdapter(Name).validate_python(options.site)
    except ValidationError:
        raise ConfigError(f"{options.site!r} is no name of a site") from None
    run_dir = options.runs / options.name
    if not (run_dir / "run.json").is_file():
        raise ConfigError(f"{run_dir} holds no run")
    (run_dir / FOLDER).mkdir(exist_ok=True)
    (run_dir / FOLDER / site).touch()
    print(f"{site} takes part again from the next round on, if it was left out")  # noqa: T201


READMIT = Command(_arguments, _run, example="NAME site-a", then="fedspan status NAME")
