"""A run's events as a live display on a terminal, or as one line each in a log."""

import logging
import time
from collections.abc import Callable
from functools import partial

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.config.section import SERVER
from common.metrics import SCORES
from common.system import logs
from common.text import clock, size
from server.run.events import Event, describe, log, log_event, stays_visible
from server.run.run_progress import RunProgress


class Display:
    """Shows events as they happen: live on a terminal, else one line per event."""

    def __init__(self, console: Console, run: str) -> None:
        self._console, self._run = console, run
        self.progress = RunProgress()
        live = console.is_terminal and not logs.as_json()
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        if self._live is not None:
            self._live.start()

    def show(self, events: list[Event]) -> None:
        """Take in events and bring the display up to date."""
        for event in events:
            self.progress.take(event)
            line = describe(event)
            if logs.as_json():
                log_event(self._run, event)
            elif line and (self._live is None or stays_visible(event)):
                self._console.print(Text(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {line}"))
        if self._live is not None:
            self._live.update(render(self.progress, time.time()), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def teller(text: Callable[[str], None], run: str, level: int = logging.WARNING) -> Callable[[str], None]:
    """A function that prints a line about a run: ``text``, or the JSON log if that is on."""
    return partial(log.log, level, extra={"run": run}) if logs.as_json() else text


def render(progress: RunProgress, now: float) -> Group:
    """The live display."""
    head = Text(f"round {progress.round}/{progress.rounds}", style="bold")
    eta = progress.eta(now)
    elapsed = now - progress.started if progress.started else 0.0
    head.append(f"   {clock(elapsed)} elapsed, {clock(eta)} to go", style="not bold")
    head.append(f"   {size(progress.bytes_down)} down, {size(progress.bytes_up)} up", style="not bold")
    table = Table(box=None, pad_edge=False)
    measured = [s for s in SCORES.values() if any(s.name in site.scores for site in progress.sites.values())]
    for column in ("site", "state", "training loss", *(f"held-out {score.in_text}" for score in measured)):
        table.add_column(column, justify="left" if column in ("site", "state") else "right")
    for name, site in sorted(progress.sites.items(), key=lambda item: (item[0] == SERVER, item[0])):
        since = f" since round {site.round}" if site.state == "training" and site.round != progress.round else ""
        state = "" if name == SERVER else site.state + since
        table.add_row(name, state, _number(site.loss), *(_number(site.scores.get(s.name)) for s in measured))
    return Group(head, ProgressBar(total=max(progress.rounds, 1), completed=progress.finished_rounds, width=60), table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
