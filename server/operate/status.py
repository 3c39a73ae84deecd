"""The status of runs, on the terminal or as JSON; only reads the runs' folders."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.errors import RunFolderError
from common.metrics import SCORES
from common.system.command import Command, number
from common.text import clock, size
from common.web.format import score, seconds, whole
from server.run.state import RunState, read_state, runs

_ROUNDS, _PROBLEMS = 10, 5  # the last so many are shown on the terminal; JSON has all
_WIDTH = 200  # where there is no terminal
_COLORS = {"running": "green", "starting": "green", "failed": "red", "dead": "red", "interrupted": "yellow"}


def listing(folder: Path) -> list[RunState]:
    """The state of all runs in a folder; a run that cannot be read is listed with the reason.

    Raises:
        RunFolderError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder} does not exist; --runs names the folder of all runs")
    found = []
    for path in runs(folder):
        try:
            found.append(read_state(path))
        except RunFolderError as error:
            found.append(RunState(path.name, "unreadable", str(error)))
    return found


def show_all(found: list[RunState]) -> RenderableType:
    """Runs as a table."""
    table = _table(
        "run", "state", "round", "strategy", "started", "lasted", "to go", right=("round", "lasted", "to go")
    )
    for run in found:
        lasted, eta = clock(run.seconds), clock(run.eta)
        table.add_row(run.name, _state(run), _round(run), run.strategy, _moment(run.started), lasted, eta)
    reasons = [Text(f"{run.name}: {run.reason}") for run in found if run.reason]
    return Group(table, *reasons) if found else Text("no runs")


def show_one(run: RunState) -> RenderableType:
    """A run with its rounds, sites and last problems."""
    head = Text.assemble((run.name, "bold"), "  ", _state(run), f"  round {_round(run)}  {run.strategy}")
    times = f"started {_moment(run.started)}, lasted {clock(run.seconds)}, to go {clock(run.eta)}"
    lines = [f"{times}, {size(run.bytes_down)} down, {size(run.bytes_up)} up"]
    ages = ", ".join(f"{count} of age {age}" for age, count in run.ages.items())
    lines += [f"updates: {ages}"] if ages else []
    lines += [f"Flower's run {run.flower_run}"] if run.flower_run else []
    lines += [f"reason: {run.reason}"] if run.reason else []
    lines += [f"to go on: {run.to_go_on}"] if run.to_go_on else []
    parts: list[RenderableType] = [head, *map(Text, lines)]
    if run.finished_rounds:
        parts += [Text(), _show_rounds(run)]
    parts += _show_sites(run) if run.sites else []
    troubles = [f"{_moment(problem.time)}  {problem.what}: {problem.reason}" for problem in run.problems[-_PROBLEMS:]]
    return Group(*parts, *map(Text, ["", *troubles] if troubles else []))


def _show_rounds(run: RunState) -> Table:
    last = run.finished_rounds[-_ROUNDS:]
    scores = [s for s in SCORES.values() if s.headline and any(s.name in line.scores for line in last)]
    names = ("round", *(known.title for known in scores), "seconds", "down", "up", "sites")
    table = _table(*names, right=names)
    for line in last:
        values = [score(line.scores.get(known.name)) for known in scores]
        moved = size(line.bytes_down), size(line.bytes_up)
        table.add_row(str(line.round), *values, seconds(line.seconds), *moved, f"{line.sites} of {line.asked}")
    return table


def _show_sites(run: RunState) -> list[RenderableType]:
    """The sites' connections and the sites' work: two tables, each fits 80 columns."""
    numbers = ("rows", "held out", "rounds", "refused", "down", "up", "train s")
    there = _table("site", "link", "doing", "last seen", "FedSpan", "device", right=())
    done = _table("site", *numbers, right=numbers)
    for site in run.sites:
        doing, last = site.doing if site.left_out is None else "left out", _moment(site.last_seen)
        if doing == "training" and site.work not in (None, run.round):
            doing = f"training since round {site.work}"
        there.add_row(site.site, site.connection, doing, last, site.version or "–", site.device or "–")
        counts = whole(site.rows), whole(site.held_out), str(site.rounds), str(site.refusals)
        done.add_row(site.site, *counts, size(site.bytes_down), size(site.bytes_up), seconds(site.seconds))
    return [Text(), there, Text(), done]


def _table(*columns: str, right: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table


def _state(run: RunState) -> Text:
    return Text(run.state, style=_COLORS.get(run.state, ""))


def _round(run: RunState) -> str:
    return f"{run.round} of {run.rounds}" if run.rounds else "–"


def _moment(time_: float | None) -> str:
    return "–" if time_ is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_))


def watch(look: Callable[[], RenderableType], console: Console, every: float | None) -> None:
    """Print the result of ``look``; with ``every``, again and again after so many seconds, until interrupted."""
    if every is None or not console.is_terminal:
        _print(look(), console)
        while every is not None:
            time.sleep(every)
            _print(look(), console)
        return
    with Live(look(), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(every)
            live.update(look(), refresh=True)


def _print(shown: RenderableType, console: Console) -> None:
    console.out(shown, highlight=False) if isinstance(shown, str) else console.print(shown)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of one run, to see its rounds and sites")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    every = number(float, 0.1, 86400.0, "seconds")
    parser.add_argument("--watch", type=every, metavar="SECONDS", help="show it again after so many seconds")
    parser.add_argument("--json", action="store_true", help="one JSON document, times in Unix seconds")


def _run(options: argparse.Namespace) -> None:
    def look() -> RenderableType:
        one = None if options.name is None else read_state(options.runs / options.name)
        if options.json:
            data = asdict(one) if one is not None else {"runs": [_summary(run) for run in listing(options.runs)]}
            return json.dumps(data)
        return show_one(one) if one is not None else show_all(listing(options.runs))

    on_terminal(look, options.watch, plain=options.json)


def on_terminal(look: Callable[[], RenderableType], every: float | None, *, plain: bool = False) -> None:
    """Show the result of ``look``; with ``every``, an interrupt is the normal end."""
    console = Console()
    if plain or not console.is_terminal:
        console = Console(width=_WIDTH, force_terminal=False)
    try:
        watch(look, console, every)
    except KeyboardInterrupt:
        if every is None:
            raise


def _summary(run: RunState) -> dict[str, object]:
    return {k: v for k, v in asdict(run).items() if k not in ("finished_rounds", "sites", "problems")}


STATUS = Command(_arguments, _run, example="NAME --watch 5", then="fedspan report NAME")
