"""What happens in a run: the kinds of events, and how each is told and logged."""

import logging
from typing import Any

from common.metrics import SCORES, Score
from common.text import size

log = logging.getLogger("fedspan")
Event = dict[str, Any]

PROBLEMS = {"client_refused", "client_failed", "update_refused", "client_excluded", "client_readmitted", "late_reply"}
PROBLEMS |= {"checkpoint_damaged"}
_ENDS = {"failed", "interrupted"}
LINKS = {"client_disconnected": "is not connected any more", "client_connected": "is connected again"}


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
    if kind in PROBLEMS:
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
        told = ", ".join(f"{score.in_text} {_number(value)}" for score, value in held_out_scores(event))
        return f"after round {event['round']}: {event['client']} held-out {told}"
    if kind == "round_finished":
        moved = f"{size(event['bytes_down'])} down, {size(event['bytes_up'])} up"
        return f"round {event['round']} done in {event['seconds']:.1f} s, {moved}"
    return f"{event['client']} {LINKS[kind]}" if kind in LINKS else ""


def log_event(run: str, event: Event) -> None:
    """Log an event of a run."""
    kind = event["event"]
    level = logging.ERROR if kind in _ENDS else logging.WARNING if kind in PROBLEMS else logging.INFO
    site = event.get("client") if event.get("client") != "server" else None
    known = {"run": run, "site": site, "round": event.get("round"), "event": kind}
    log.log(level, "%s", describe(event) or event.get("reason") or kind, extra=known)


def held_out_scores(event: Event) -> list[tuple[Score, float | None]]:
    """The scores that an evaluation tells, in their fixed order; None: not finite."""
    return [(score, event[name]) for name, score in SCORES.items() if name in event]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
