"""Stop a run: ``fedspan stop NAME``. Its supervisor ends all of its processes; it can go on later."""

import argparse
from pathlib import Path

from common.system.command import Command, number
from server.run.state import read_state
from server.run.supervisor_lock import stop


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    seconds = number(float, 0.1, 86400.0, "seconds")
    parser.add_argument(
        "--deadline", type=seconds, default=60.0, metavar="SECONDS", help="longest wait for its end (default: 60)"
    )


def _run(options: argparse.Namespace) -> None:
    run_dir = options.runs / options.name
    read_state(run_dir)
    stopped = stop(run_dir, options.deadline)
    run = read_state(run_dir)
    what = f"is stopped after round {len(run.finished_rounds)}" if stopped else "is not running"
    go_on = f"; to go on: {run.to_go_on}" if run.to_go_on else ""
    print(f"{options.name} {what} ({run.state}){go_on}")  # noqa: T201


STOP = Command(_arguments, _run, example="NAME", then="fedspan run FEDERATION.yaml --name NAME --resume")
