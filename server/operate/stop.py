"""Stop a run: ``python -m server.operate.stop NAME``. Its supervisor ends all of its processes; it can go on later."""

import argparse
import sys
from pathlib import Path

from common.errors import FedSpanError
from server.run.state import overview
from server.run.supervisor_lock import stop


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m server.operate.stop", description="Stop a run on this machine.")
    parser.add_argument("name", metavar="NAME", help="of the run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS", help="to wait (default: 60)")
    options = parser.parse_args(arguments)
    if not 0 < options.deadline < float("inf"):
        parser.error(f"--deadline is {options.deadline:g}; allowed: more than 0 seconds")
    run_dir = options.runs / options.name
    try:
        overview(run_dir)
    except FedSpanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        stopped = stop(run_dir, options.deadline)
        run = overview(run_dir)
    except FedSpanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    what = f"is stopped after round {len(run.finished_rounds)}" if stopped else "is not running"
    go_on = f"; to go on: {run.to_go_on}" if run.to_go_on else ""
    print(f"{options.name} {what} ({run.state}){go_on}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
