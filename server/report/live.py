"""The page of a run as it goes on: the report's own sections, below what happens now."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from common.text import one_line
from common.web.format import duration
from common.web.template import Page, Section, fill
from server.report import words
from server.report.figures import Figure, figures
from server.report.write import head, sections
from server.run.events import describe, event_kind
from server.run.read import Run, read_all
from server.run.state import RunState, SiteState, state_of

_RUN, _METRICS = "run.json", "metrics.jsonl"
_FILES = (_METRICS, "events.jsonl", "samples.json", "security.json", "nodes.json", "federation.yaml")
_EVENTS = 12  # the last so many are shown
_LONGEST = 240  # bytes of an event's words; a round of many sites names them all
_REST, _DRAWING_REST = 4, 20  # times as long as it took, before files are read, or figures are drawn, again


@dataclass(frozen=True)
class Line:
    """A site's line.

    Attributes:
        doing: its activity; ``since``: seconds since it began.
        far: how far it is with that, in words; ``share``: as a number up to 1; None: not known.
        seen: seconds since its last sign of life.
        why: the reason why it is refused or left out.
    """

    site: SiteState
    doing: str
    since: float | None
    far: str
    share: float | None
    seen: float | None
    why: str | None


class LivePage:
    """A run's page, made anew of its folder whenever it is called; what has not changed is not made again.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._run: Run | None = None
        self._seen: tuple[object, object] | None = None
        self._sections: list[Section] = []
        self._drawn: dict[str, list[Figure]] = {}
        self._measured: object = None
        self._read_after = self._draw_after = 0.0

    def __call__(self) -> Page:
        """The page as of now.

        Raises:
            RunFolderError: there is no run, or a file of it cannot be read.
        """
        run = self._read()
        now = time.time()
        state = state_of(run, now)
        live = state.state in ("starting", "running")
        here = [Section("now", "Now", "Now", _now(run, state, now))] if live else []
        done = f" {run.done}/{run.planned}" if live else ""
        return Page(f"{run.name}: {state.state}{done}", head(run, state, live=True), [*here, *self._sections])

    def _read(self) -> Run:
        measured, began = _stamp(self._run_dir / _METRICS), time.monotonic()
        status, rest = _stamp(self._run_dir / _RUN), [_stamp(self._run_dir / name) for name in _FILES]
        ended = self._seen is None or self._seen[0] != status  # begun, ended, or something else that cannot wait
        redraw = measured != self._measured and (ended or began >= self._draw_after)
        if self._run is None or ended or ((self._seen != (status, rest) or redraw) and began >= self._read_after):
            self._run, took = read_all(self._run_dir), 0.0
            if redraw:
                drawing = time.monotonic()
                self._drawn, self._measured = figures(self._run), measured
                took = time.monotonic() - drawing
                self._draw_after = time.monotonic() + _DRAWING_REST * took
            self._sections = sections(self._run, self._drawn)
            self._seen = (status, rest)
            self._read_after = time.monotonic() + _REST * (time.monotonic() - began - took)
        return self._run


def _stamp(file: Path) -> tuple[int, int] | None:
    """Changes when the file does; None: there is no file."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    return about.st_mtime_ns, about.st_size


def _now(run: Run, state: RunState, now: float) -> Markup:
    told = [(event, one_line(describe(event), _LONGEST)) for event in run.events[-3 * _EVENTS :]]
    events = [
        (event["time"], words.without_paths(text), "bad" if event_kind(event).level >= logging.WARNING else "")
        for event, text in reversed(told)
        if text
    ]
    return fill(
        Path(__file__).with_name("now.html"),
        state=state,
        now=now,
        words=_progress(run, state),
        done=run.done,
        connected=sum(site.connection == "up" for site in state.sites),
        lines=sorted((_line(site, now, state.round) for site in state.sites), key=lambda line: not _in_trouble(line)),
        events=events[:_EVENTS],
    )


def _progress(run: Run, state: RunState) -> str:
    if state.state == "starting" or not run.events:
        return "The server is starting."
    if run.events[-1]["event"] == "waiting":
        return describe(run.events[-1]).capitalize()
    if run.event("delivering").get("time", 0.0) > run.event("round_started").get("time", 0.0):
        return "The rounds are over; the model goes to the sites."
    if not state.round:
        return "No round has begun."
    begun = f"Round {state.round} of {state.rounds} is under way" if state.round > run.done else "Between two rounds"
    return f"{begun}; {run.done} {'is' if run.done == 1 else 'are'} done."


def _in_trouble(line: Line) -> bool:
    return line.why is not None or line.site.connection in ("down", "refused")


def _line(site: SiteState, now: float, number: int) -> Line:
    doing = "left out" if site.left_out else "refused" if site.connection == "refused" else site.doing or "–"
    since = None if site.since is None else max(now - site.since, 0.0)
    share, far = None, ""
    if doing == "training" and since is not None:
        share, far = _far(since, site.usual)
        far += f", since round {site.work}" if site.work not in (None, number) else ""
    why = site.left_out or (site.reason if doing not in ("joined", "connected") else None)
    seen = None if site.last_seen is None else max(now - site.last_seen, 0.0)
    return Line(site, doing, since, far, share, seen, words.without_paths(why) if why else None)


def _far(since: float, usual: float | None) -> tuple[float | None, str]:
    """How far a site is in its round, by the seconds of its last one: share and words."""
    if not usual:
        return None, "its first round"
    if since > usual:
        return 1.0, f"longer than the last time ({duration(usual)})"
    return since / usual, f"about {since / usual:.0%} of {duration(usual)}"
