"""Messages that were sent and wait for a reply; replies come out one at a time, as they arrive."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import FederationError

POLL_SECONDS = 0.5  # the SuperLink is on this machine: asking costs little


@dataclass(frozen=True)
class Sent:
    """A message under way.

    Attributes:
        node_id: whom it went to.
        group: what it belongs to, e.g. "train/3"; replies are asked for by group.
        at: Unix time when the SuperLink had it.
    """

    node_id: int
    group: str
    at: float


class Mailbox:
    """Sends messages and hands out their replies without ever holding more than one of them."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, Sent] = {}
        self._late: dict[str, Sent] = {}

    def push(self, messages: Iterable[Message], group: str) -> None:
        """Hand messages to the SuperLink.

        Raises:
            FederationError: the SuperLink did not take one of them.
        """
        outgoing = list(messages)
        ids = list(self._grid.push_messages(outgoing))
        if len(ids) != len(outgoing) or not all(ids):
            raise FederationError(f"the SuperLink took {sum(map(bool, ids))} of {len(outgoing)} messages of {group}")
        now = time.time()
        for message_id, message in zip(ids, outgoing, strict=True):
            self._open[message_id] = Sent(message.metadata.dst_node_id, group, now)

    def arrived(self, group: str) -> Iterator[tuple[Sent, Message]]:
        """The replies of a group that are there now."""
        for message_id in [i for i, sent in self._open.items() if sent.group == group]:
            for reply in self._grid.pull_messages([message_id]):
                yield self._open.pop(message_id), reply
                del reply

    def replies(
        self, group: str, deadline: Callable[[], float], more: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Sent, Message]]:
        """The replies of a group until all are there or ``time.monotonic()`` has passed ``deadline``.

        Between two questions ``more`` is called, which may push messages of the group, and says whether it is to be
        called again although nobody is waited for.
        """
        going_on = bool(self.waiting(group))
        while going_on:
            yield from self.arrived(group)
            if time.monotonic() > deadline():
                return
            going_on = more() or bool(self.waiting(group))
            if going_on:
                time.sleep(POLL_SECONDS)

    def waiting(self, group: str) -> list[int]:
        """Nodes that have not answered the messages of a group."""
        return [sent.node_id for sent in self._open.values() if sent.group == group]

    def forget(self, group: str, node_id: int | None = None) -> list[int]:
        """Give up on the open messages of a group, or of one node; the nodes that did not answer. See `late`."""
        late = {i: s for i, s in self._open.items() if s.group == group and node_id in (None, s.node_id)}
        self._open = {i: sent for i, sent in self._open.items() if i not in late}
        self._late |= late
        return [sent.node_id for sent in late.values()]

    def late(self, patience: float) -> Iterator[Sent]:
        """Messages given up on whose replies have come since; these are dropped.

        Args:
            patience: seconds after which a message is not asked for any more.
        """
        now = time.time()
        self._late = {i: sent for i, sent in self._late.items() if now < sent.at + patience}
        for message_id in list(self._late):
            if any(True for _ in self._grid.pull_messages([message_id])):
                yield self._late.pop(message_id)
