"""How FedSpan's processes log: readable lines, or with FEDSPAN_LOG=json one JSON object per line.

The object's keys: time (UTC), level, component, message, and where known run, site, round, event. For an exception the
log has the type and the places that the exception passed through, never the text, which might quote a row.
FEDSPAN_TRACEBACK=1 adds the text, for people who may see the data.

``client.connect.worker_process`` loads this file by its path, so this file imports nothing of FedSpan.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

FORMAT, TRACEBACK = "FEDSPAN_LOG", "FEDSPAN_TRACEBACK"  # environment variables
_KNOWN = ("run", "site", "round", "event")  # given with `extra`
_OURS = {"root", "join", "link", "site", "worker", "supervisor", "client", "common", "server", "strategies", "deploy"}
_streams: list[TextIO] = []  # where our lines go, once all others are set aside


class _Lines(logging.Formatter):
    """Readable lines; a control character that somebody else has written is shown, not sent to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as lines."""
        return _shown(super().format(record), "\n\t")

    def formatException(  # noqa: N802 - logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """The stack and the type of an exception and of those that led to it."""
        error = ei[1]
        if os.environ.get(TRACEBACK) == "1":
            return super().formatException(ei)
        parts = []
        while error is not None:
            parts.append("".join(traceback.format_tb(error.__traceback__)) + type(error).__name__)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\nraised after\n".join(parts) + f"\n(its text is left out; {TRACEBACK}=1 shows it)"


class _Json(_Lines):
    """One JSON object per line."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        """A record as one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": self._component,
        }
        line |= {key: value for key in _KNOWN if (value := getattr(record, key, None)) is not None}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _shown(json.dumps(line, ensure_ascii=False))


def _shown(text: str, kept: str = "") -> str:
    return "".join(c if c.isprintable() or c in kept else json.dumps(c)[1:-1] for c in text)


def as_json() -> bool:
    """Whether JSON is asked for.

    Raises:
        ValueError: FEDSPAN_LOG is neither "json" nor "text".
    """
    chosen = os.environ.get(FORMAT) or "text"
    if chosen not in ("json", "text"):
        raise ValueError(f"{FORMAT} is {chosen!r}; allowed: json, text")
    return chosen == "json"


def configure(component: str, part: str = "") -> None:
    """Set up this process's log on standard error, Flower's lines included, unless it is set up already.

    Args:
        component: the name of this process, for a log in JSON.
        part: which of several such processes; in every line.

    Raises:
        ValueError: FEDSPAN_LOG is neither "json" nor "text".
    """
    who = f"{part}, " if part else ""
    lines = _Lines(f"%(asctime)s {who}%(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    formatter = _Json(f"{who}{component}") if as_json() else lines
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    handler.setLevel(logging.INFO)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("flwr").handlers.clear()  # Flower's own handler would print every line a second time
    sys.excepthook = lambda *error: root.critical("the process ends on an error", exc_info=error)


def own() -> TextIO:
    """The stream of this process's own lines: standard error as it was at the start."""
    return _streams[0] if _streams else sys.stderr


def descriptor() -> int:
    """Number of the open file that this process's log goes to."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream in memory, as in tests
                return int(handler.stream.fileno())
    return 2


def set_aside(file: Path) -> None:
    """From now on write what this process's libraries print or log to a file; our own log goes on as before.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    _streams.append(os.fdopen(os.dup(2), "w", buffering=1))
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    root = logging.getLogger()
    theirs = logging.StreamHandler(sys.stderr)
    theirs.addFilter(lambda record: not _is_ours(record))
    for handler in root.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(own())
            handler.addFilter(_is_ours)
            theirs.setFormatter(handler.formatter)
    root.addHandler(theirs)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OURS
