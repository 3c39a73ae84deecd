"""Watch a run: ``fedspan watch NAME``, on the terminal or, with ``--web``, as a page in the browser."""

import argparse
from pathlib import Path

from common.errors import ConfigError
from common.system.command import Command
from common.web.serve import add_page_options, serve

_SECONDS = 2.0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument("--web", action="store_true", help="serve a page about it, and print the page's address")
    add_page_options(parser)


def _run(options: argparse.Namespace) -> None:
    run_dir = options.runs / options.name
    if options.web:
        from server.report.live import LivePage  # draws with matplotlib

        serve(LivePage(run_dir), options.port, browser=options.open)
        return
    if options.port is not None or options.open:
        raise ConfigError("--port and --open are of the page: give --web as well")
    from server.operate.status import on_terminal, show_one
    from server.run.state import read_state

    on_terminal(lambda: show_one(read_state(run_dir)), _SECONDS)


WATCH = Command(
    _arguments,
    _run,
    example="NAME --web",
    then="the address that it prints, in a browser on this machine",
    notes="The page is the run's report, with what happens now above it; it can be watched before, during and after\n"
    "the run. From another machine: ssh -L 8080:127.0.0.1:PORT, and the same address with 8080.",
)
