"""The events of a run: one table of all kinds of events, which the writer checks and every reader uses.

An event is a line of events.jsonl: time (Unix seconds), kind, and the fields that the table names. A new kind of event
needs a line in the table and a call of ``RunFolder.event``; log, display, status, Prometheus and report then know it.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from typing import Any, Literal

from common.config.section import SERVER
from common.metrics import SCORES, Score
from common.text import one_line, size

log = logging.getLogger("fedspan")
Event = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of event.

    Attributes:
        fields: names of the event's fields, separated by spaces. ``client`` is the name of a site or "server",
            ``clients`` the names of several sites, ``reason`` a sentence, ``kind`` the kind of the error behind it,
            ``counted`` whether the failure counts as a rejection. A field that ends with "?" may be absent.
        words: the event as a line for people: a template with the fields, or a function; "" for no line.
        level: level of the line in the log.
        stays: the line stays on the terminal, above the live display. Warnings and errors always stay.
        state: the activity of the named sites from now on; of all sites, when the event names none.
        outcome: the result of the named sites' part in the round.
        link: the state of the site's connection from now on.
        seen: the event comes from the site itself, so the site is alive.
        problem: title in lists of refusals and failures; "" for no problem.
    """

    fields: str
    words: str | Callable[[Event], str] = ""
    level: int = INFO
    stays: bool = False
    state: str = ""
    outcome: Literal["", "asked", "trained", "refused", "failed"] = ""
    link: Literal["", "up", "down", "refused"] = ""
    seen: bool = False
    problem: str = ""


def _started(event: Event) -> str:
    share = event["trained_parameters"] / max(event["model_parameters"], 1)
    what = f"{event['trained_tensors']} tensors, {event['trained_parameters']:,} parameters ({share:.1%})"
    return f"{event['strategy']}: {event['rounds']} rounds, training {what}"


def _joined(event: Event) -> str:
    told = f"{event['held_out']} held out" if event["held_out"] else "held-out rows not told"
    return f"{event['client']} joined: {event['num_examples']} rows, {told}, {event['device']}"


def _reply(event: Event) -> str:
    loss = _number(event["loss"])
    since = f" since round {event['round'] - event['age']}" if event.get("age") else ""
    return f"round {event['round']}: {event['client']} trained{since}, loss {loss}, {event['seconds']:.1f} s"


def _evaluated(event: Event) -> str:
    told = ", ".join(
        f"{score.in_text} {'not finite' if value is None else _number(value)}"
        for score, value in held_out_scores(event)
    )
    return f"after round {event['round']}: {event['client']} held-out {told}"


def _delivered(event: Event) -> str:
    other = "" if event["same"] else "; its files are not the same, byte for byte, as the server's"
    return f"{event['client']} has the model of round {event['round']}{other}"


def _round_finished(event: Event) -> str:
    moved = f"{size(event['bytes_down'])} down, {size(event['bytes_up'])} up"
    return f"round {event['round']} done in {event['seconds']:.1f} s, {moved}"


KINDS: dict[str, Kind] = {
    # the run
    "started": Kind("rounds strategy trained_tensors trained_parameters model_parameters", _started),
    "resumed": Kind("round", "resumed after round {round}", stays=True),
    "checkpoint_damaged": Kind("reason", "checkpoint damaged: {reason}", WARNING),
    "tracker_failed": Kind("reason", "{reason}", WARNING),
    "best_round": Kind("round metric score", "round {round} is the best so far: {metric} {score:.4g}"),
    "stopped_early": Kind("round reason", "stopped after round {round}: {reason}", stays=True),
    "finished": Kind("seconds", state="done"),
    "failed": Kind("reason kind causes", level=ERROR),
    "interrupted": Kind("reason", level=ERROR),
    # sites that join, leave and return
    "waiting": Kind(
        "connected needed deadline", "waiting for sites: {connected} of {needed} (at most {deadline} s more)"
    ),
    "client_joined": Kind(
        "client num_examples held_out device version privacy",
        _joined,
        state="joined",
        link="up",
        seen=True,
    ),
    "client_refused": Kind(
        "client reason kind",
        "client refused: {reason}",
        WARNING,
        state="refused",
        link="refused",
        seen=True,
        problem="not admitted",
    ),
    "client_connected": Kind(
        "client", "{client} is connected again", stays=True, state="connected", link="up", seen=True
    ),
    "client_disconnected": Kind(
        "client", "{client} is not connected any more", stays=True, state="not connected", link="down"
    ),
    # a round
    "round_started": Kind(
        "round clients deadline",
        lambda event: f"round {event['round']}: {', '.join(event['clients'])}",
        state="training",
        outcome="asked",
    ),
    "round_begun_anew": Kind(
        "round client reason", "the round begins anew: {reason}", WARNING, problem="round begun anew"
    ),
    "work_given": Kind("round client", state="training", outcome="asked"),
    "reply": Kind("round client loss seconds age?", _reply, state="waiting", outcome="trained", seen=True),
    "update_refused": Kind(
        "round client reason kind",
        "update refused: {reason}",
        WARNING,
        state="update refused",
        outcome="refused",
        seen=True,
        problem="update refused",
    ),
    "update_dropped": Kind(
        "round client age reason",
        "update dropped: {reason}",
        WARNING,
        state="too old",
        outcome="failed",
        seen=True,
        problem="too old",
    ),
    "client_failed": Kind(
        "round client reason kind counted",
        "client failed: {reason}",
        WARNING,
        state="failed",
        outcome="failed",
        problem="failed",
    ),
    "client_excluded": Kind(
        "client reason", "client excluded: {reason}", WARNING, state="left out", problem="left out"
    ),
    "client_readmitted": Kind(
        "client reason", "client readmitted: {reason}", WARNING, state="joined", problem="readmitted"
    ),
    "weight_capped": Kind("client reason", "weight capped: {reason}", WARNING, problem="weight capped"),
    "late_reply": Kind("client reason", "late reply: {reason}", WARNING, problem="too late"),
    "evaluated": Kind("round client scores", _evaluated, seen=True),
    # the delivery
    "delivering": Kind(
        "clients deadline", lambda event: f"the model goes to {', '.join(event['clients'])}", state="gets the model"
    ),
    "model_delivered": Kind("client round same", _delivered, stays=True, state="has the model", seen=True),
    "model_missing": Kind("client reason", "no model at {reason}", WARNING, state="no model", problem="no model yet"),
    "round_finished": Kind("round seconds bytes_down bytes_up", _round_finished, stays=True),
}
_UNKNOWN = Kind("")


def new_event(kind: str, fields: Mapping[str, object]) -> Event:
    """An event that happens now.

    Raises:
        ValueError: the table has no such kind, or other fields for it.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of event; allowed: {', '.join(KINDS)}")
    needed = {name for name in KINDS[kind].fields.split() if not name.endswith("?")}
    if not needed <= fields.keys() <= {name.rstrip("?") for name in KINDS[kind].fields.split()}:
        raise ValueError(f"event {kind!r} has the fields {' '.join(fields)}; allowed: {KINDS[kind].fields}")
    shown = {key: one_line(value) if isinstance(value, str) else value for key, value in fields.items()}
    return {"time": round(time.time(), 3), "event": kind, **shown}


def event_kind(event: Event) -> Kind:
    """The kind of an event that was read; a kind that this version does not know has no effect."""
    return KINDS.get(event["event"], _UNKNOWN)


def named_in(event: Event) -> list[str]:
    """The sites (or the server) that an event names."""
    return [event["client"]] if "client" in event else list(event.get("clients", []))


def held_out_scores(event: Event) -> list[tuple[Score, float | None]]:
    """The scores in an evaluation's event, in their fixed order; None: not finite."""
    return [(score, event["scores"][name]) for name, score in SCORES.items() if name in event["scores"]]


def describe(event: Event) -> str:
    """An event in words; empty when it is not worth a line."""
    words = event_kind(event).words
    return words.format_map(event) if isinstance(words, str) else words(event)


def stays_visible(event: Event) -> bool:
    """Whether an event's line stays on the terminal."""
    kind = event_kind(event)
    return kind.stays or kind.level >= WARNING


def log_event(run: str, event: Event) -> None:
    """Log an event of a run."""
    site = event.get("client") if event.get("client") != SERVER else None
    known = {"run": run, "site": site, "round": event.get("round"), "event": event["event"]}
    text = describe(event) or event.get("reason") or event["event"]
    log.log(event_kind(event).level, "%s", text, extra=known)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
