"""A Flower grid that yields replies one at a time, as they arrive, so that memory stays flat (decision 008)."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

_POLL_SECONDS = 0.5


class StreamingGrid:
    """Wraps a grid: ``send_and_receive`` yields replies instead of collecting them; the rest is the grid's own.

    Args:
        grid: Flower's grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send all messages at once, then yield replies until all arrived or ``timeout`` seconds have passed."""
        waiting = {message_id for message_id in self._grid.push_messages(messages) if message_id}
        return self._replies(waiting, None if timeout is None else time.monotonic() + timeout)

    def _replies(self, waiting: set[str], deadline: float | None) -> Iterator[Message]:
        while waiting and (deadline is None or time.monotonic() < deadline):
            for message_id in sorted(waiting):
                replies = list(self._grid.pull_messages([message_id]))
                if replies:
                    waiting.discard(message_id)
                    yield replies.pop()  # decision 008: a list that is iterated would keep the reply
            if waiting:
                time.sleep(_POLL_SECONDS)
