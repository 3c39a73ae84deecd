"""A run's events as a live display on a terminal, or as one line each in a log."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.metrics import SCORES, Score
from common.system import logs
from common.text import size

log = logging.getLogger("fedspan")
Event = dict[str, Any]


@dataclass
class _Site:
    state: str = "joining"
    loss: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)  # on held-out rows; None: not finite


@dataclass
class Picture:
    """What is known of a run, built up from its events."""

    rounds: int = 0
    round: int = 0
    finished_rounds: int = 0
    started: float = 0.0
    first_round: float = 0.0
    rounds_seen: int = 0  # finished since the start or the resumption
    bytes_down: int = 0
    bytes_up: int = 0
    sites: dict[str, _Site] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take in one event; unknown kinds change nothing."""
        kind, client = event["event"], event.get("client", "")
        if kind == "started":
            self.rounds, self.started = event["rounds"], event["time"]
        elif kind == "round_started":
            self.round = event["round"]
            self.first_round = self.first_round or event["time"]
            for name in event["clients"]:
                self.sites.setdefault(name, _Site()).state = "training"
        elif kind in ("round_finished", "resumed"):
            self.finished_rounds = event["round"]
            self.rounds_seen += kind == "round_finished"
            self.bytes_down += event.get("bytes_down", 0)
            self.bytes_up += event.get("bytes_up", 0)
        elif kind == "evaluated":
            site = self.sites.setdefault(client, _Site("evaluating"))
            site.scores = {score.name: value for score, value in _scores(event)}
        elif kind == "reply":
            site = self.sites.setdefault(client, _Site())
            site.state, site.loss = "waiting", event.get("loss")
        elif kind in _STATES:
            self.sites.setdefault(client, _Site()).state = _STATES[kind]
        elif kind == "finished":
            for site in self.sites.values():
                site.state = "done"

    def eta(self, now: float) -> float | None:
        """Seconds to the end, from the rounds that are finished; None before the first."""
        if not self.rounds_seen:
            return None
        return (now - self.first_round) / self.rounds_seen * (self.rounds - self.finished_rounds)


_STATES = {
    "client_joined": "joined",
    "client_refused": "refused",
    "client_failed": "failed",
    "update_refused": "update refused",
    "client_excluded": "left out",
    "client_readmitted": "joined",
    "client_disconnected": "not connected",
    "client_connected": "connected",
}


class Display:
    """Shows events as they come: live on a terminal, else one line per event."""

    def __init__(self, console: Console, run: str) -> None:
        self._console, self._run = console, run
        self.picture = Picture()
        live = console.is_terminal and not logs.as_json()
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        if self._live is not None:
            self._live.start()

    def show(self, events: list[Event]) -> None:
        """Take in events and bring the display up to date."""
        for event in events:
            self.picture.take(event)
            line = describe(event)
            if logs.as_json():
                log_event(self._run, event)
            elif line and (self._live is None or event["event"] in _ALWAYS):
                self._console.print(Text(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {line}"))
        if self._live is not None:
            self._live.update(render(self.picture, time.time()), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


_PROBLEMS = {"client_refused", "client_failed", "update_refused", "client_excluded", "client_readmitted", "late_reply"}
_PROBLEMS |= {"checkpoint_damaged"}
_ENDS = {"failed", "interrupted"}
_LINKS = {"client_disconnected": "is not connected any more", "client_connected": "is connected again"}
_ALWAYS = {*_PROBLEMS, *_LINKS, "resumed", "round_finished"}


def describe(event: Event) -> str:
    """An event in words; empty when it is not worth a line."""
    kind = event["event"]
    if kind == "started":
        share = event["trained_parameters"] / max(event["model_parameters"], 1)
        what = f"{event['trained_tensors']} tensors, {event['trained_parameters']:,} parameters ({share:.1%})"
        return f"{event['strategy']}: {event['rounds']} rounds, training {what}"
    if kind == "waiting":
        return f"waiting for sites: {event['connected']} of {event['needed']} (at most {event['deadline']} s more)"
    if kind == "client_joined":
        return (
            f"{event['client']} joined: {event['num_examples']} rows, {event['held_out']} held out, {event['device']}"
        )
    if kind in _PROBLEMS:
        return f"{kind.replace('_', ' ')}: {event['reason']}"
    if kind == "resumed":
        return f"resumed after round {event['round']}" + (
            f"; the sites' {event['lost']} start anew" if event.get("lost") else ""
        )
    if kind == "round_started":
        return f"round {event['round']}: {', '.join(event['clients'])}"
    if kind == "reply":
        loss = _number(event["loss"])
        return f"round {event['round']}: {event['client']} trained, loss {loss}, {event['seconds']:.1f} s"
    if kind == "evaluated":
        told = ", ".join(f"{score.in_text} {_number(value)}" for score, value in _scores(event))
        return f"after round {event['round']}: {event['client']} held-out {told}"
    if kind == "round_finished":
        moved = f"{size(event['bytes_down'])} down, {size(event['bytes_up'])} up"
        return f"round {event['round']} done in {event['seconds']:.1f} s, {moved}"
    return f"{event['client']} {_LINKS[kind]}" if kind in _LINKS else ""


def log_event(run: str, event: Event) -> None:
    """Log an event of a run."""
    kind = event["event"]
    level = logging.ERROR if kind in _ENDS else logging.WARNING if kind in _PROBLEMS else logging.INFO
    site = event.get("client") if event.get("client") != "server" else None
    known = {"run": run, "site": site, "round": event.get("round"), "event": kind}
    log.log(level, "%s", describe(event) or event.get("reason") or kind, extra=known)


def teller(text: Callable[[str], None], run: str, level: int = logging.WARNING) -> Callable[[str], None]:
    """What says a line about a run: ``text``, or a JSON log."""
    return partial(log.log, level, extra={"run": run}) if logs.as_json() else text


def render(picture: Picture, now: float) -> Group:
    """The live display."""
    head = Text(f"round {picture.round}/{picture.rounds}", style="bold")
    eta = picture.eta(now)
    elapsed = now - picture.started if picture.started else 0.0
    head.append(f"   {clock(elapsed)} elapsed, {'--:--' if eta is None else clock(eta)} to go", style="not bold")
    head.append(f"   {size(picture.bytes_down)} down, {size(picture.bytes_up)} up", style="not bold")
    table = Table(box=None, pad_edge=False)
    measured = [s for s in SCORES.values() if any(s.name in site.scores for site in picture.sites.values())]
    for column in ("site", "state", "training loss", *(f"held-out {score.in_text}" for score in measured)):
        table.add_column(column, justify="left" if column in ("site", "state") else "right")
    for name, site in sorted(picture.sites.items(), key=lambda item: (item[0] == "server", item[0])):
        state = "" if name == "server" else site.state
        table.add_row(name, state, _number(site.loss), *(_number(site.scores.get(s.name)) for s in measured))
    return Group(head, ProgressBar(total=max(picture.rounds, 1), completed=picture.finished_rounds, width=60), table)


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _scores(event: Event) -> list[tuple[Score, float | None]]:
    """The scores that an evaluation tells, in their fixed order; None: not finite."""
    return [(score, event[name]) for name, score in SCORES.items() if name in event]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
