"""Write a run's report anew: ``fedspan report NAME``."""

import argparse
from pathlib import Path

from common.system.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )


def _run(options: argparse.Namespace) -> None:
    from server.report.write import write_report  # draws with matplotlib

    print(write_report(options.runs / options.name))  # noqa: T201


REPORT = Command(
    _arguments,
    _run,
    example="NAME",
    then="runs/NAME/report.html, in a browser",
    notes="Made from the run's folder alone, also of a run that failed or goes on.",
)
