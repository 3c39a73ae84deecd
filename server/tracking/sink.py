"""The one interface of all trackers, and the thread that keeps a remote one away from the run."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.errors import kind_of
from common.text import SENTENCE, one_line


@dataclass(frozen=True)
class Tracked:
    """The run as a tracker knows it.

    Attributes:
        name: the run's name.
        id: its own id, hex; a resumed run keeps it, and so goes on in the same run of the tracker.
        folder: the run's folder.
        federation: the federation's name.
        settings: the settings that sites see, with dotted keys.
    """

    name: str
    id: str
    folder: Path
    federation: str
    settings: Mapping[str, Any]


class Sink(Protocol):
    """Takes the numbers of a run."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take finite numbers by their tags, ``section/key/client``; ``step`` is the round."""

    def end(self, status: str) -> None:
        """Flush and close; ``status`` as in run.json."""


class InBackground:
    """A sink in a thread of its own: what it does takes no time of the run, and its failure ends only itself.

    Args:
        make: opens the sink; called in the thread.
    """

    def __init__(self, make: Callable[[], Sink]) -> None:
        self._make = make
        self._failure: str | None = None
        self._waiting: queue.SimpleQueue[tuple[Mapping[str, float], int] | str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See ``Sink``; returns at once."""
        self._waiting.put((dict(numbers), step))

    def ask_to_end(self, status: str) -> None:
        """See ``Sink.end``; returns at once."""
        self._waiting.put(status)

    def failure(self, until: float | None = None) -> str | None:
        """The reason why the sink has failed; None: it has not.

        Args:
            until: wait for its end up to this time, by ``time.monotonic``; one that has not ended has failed.
        """
        if until is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive() and self._failure is None:
                return "it has not taken all numbers in time"
        return self._failure

    def _work(self) -> None:
        try:
            sink = self._make()
            while not isinstance(item := self._waiting.get(), str):
                sink.log(*item)
            sink.end(item)
        except BaseException as error:  # noqa: BLE001 - a tracker may raise anything, also SystemExit
            self._failure = one_line(f"{kind_of(error)}: {error}", SENTENCE)
