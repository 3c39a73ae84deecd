"""Messages in flight: sent, and waiting for a reply. Replies are yielded one at a time, as they arrive."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from common.errors import FederationError, WireError, WorkerDied
from common.protocol.messages import Failure

POLL_SECONDS = 0.2  # the SuperLink is on this machine: asking costs little
_POLL_SECONDS_EACH = 0.02  # per message in flight: asking for one reply takes about as long
#: So long a pull may hold up the other replies; a pull that takes longer goes on in its thread (decision 010).
_PULL_SECONDS = 2.0
#: Codes of the SuperLink's own replies: no site has answered.
SUPERLINKS = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
#: Codes of replies that say that a message was lost with the process that had it; the site has refused nothing.
LOST = {WorkerDied.code, ErrorCode.CLIENT_APP_CRASHED, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}


def failure_in(reply: Message) -> Failure | None:
    """The error in a reply, a ``WireError`` when the error cannot be believed; None: the reply holds no error.

    A SuperLink accepts a node's replies only under the node's own number, so the number tells who made the error.
    """
    if not reply.has_error():
        return None
    try:
        failure = Failure.read(reply.error)
    except WireError as unreadable:
        return Failure.of(unreadable)
    if failure.code in SUPERLINKS and reply.metadata.src_node_id != SUPERLINK_NODE_ID:
        return Failure.of(WireError(f"it answered {failure.kind}, which only the SuperLink may say"))
    return failure


@dataclass(frozen=True)
class Sent:
    """A message in flight.

    Attributes:
        node_id: the node that it was sent to.
        group: the message's group, e.g. "train/3"; replies are asked for by group.
        at: Unix time when the SuperLink took the message.
    """

    node_id: int
    group: str
    at: float


class _Pull(threading.Thread):
    """Pulls the reply to one message from the SuperLink, in a thread.

    Flower's ``pull_messages`` blocks until a reply is uploaded completely, up to two hours over a slow link. In the
    server's main thread one slow site would hold up all others and the deadline (decision 010).
    """

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(daemon=True)
        self._grid, self._message_id = grid, message_id
        self._found: list[Message] = []
        self._error: Exception | None = None
        self.start()
        self.join(_PULL_SECONDS)

    def run(self) -> None:
        try:
            self._found = list(self._grid.pull_messages([self._message_id]))
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error

    def result(self) -> list[Message]:
        """The reply, if the pull has ended with one; else no message."""
        if self.is_alive():
            return []
        if self._error is not None:
            raise self._error
        return self._found


class InFlight:
    """Sends messages and yields their replies, one at a time and each once."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, Sent] = {}
        self._late: dict[str, Sent] = {}
        self._pulls: dict[str, _Pull] = {}  # unfinished pulls, by message id: the reply is still being uploaded

    def push(self, messages: Iterable[Message], group: str) -> None:
        """Send messages to the SuperLink.

        Raises:
            FederationError: the SuperLink did not take all of them.
        """
        outgoing = list(messages)
        ids = list(self._grid.push_messages(outgoing))
        if len(ids) != len(outgoing) or not all(ids):
            raise FederationError(f"the SuperLink took {sum(map(bool, ids))} of {len(outgoing)} messages of {group}")
        now = time.time()
        for message_id, message in zip(ids, outgoing, strict=True):
            self._open[message_id] = Sent(message.metadata.dst_node_id, group, now)

    def arrived(self, group: str) -> Iterator[tuple[Sent, Message]]:
        """The replies of a group that have arrived by now."""
        for message_id in [i for i, sent in self._open.items() if sent.group == group]:
            replies = self._pull(message_id)
            if replies:
                yield self._open.pop(message_id), replies.pop()

    def _pull(self, message_id: str) -> list[Message]:
        """The reply to a message, if it has arrived."""
        pull = self._pulls.pop(message_id, None) or _Pull(self._grid, message_id)
        if pull.is_alive():
            self._pulls[message_id] = pull
        return pull.result()

    def replies(
        self, group: str, deadline: Callable[[], float], more: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Sent, Message]]:
        """Yield the replies of a group until all have arrived or ``time.monotonic()`` has passed ``deadline``.

        Between two polls the method calls ``more``, which may send further messages of the group. When no message is in
        flight, polling goes on as long as ``more`` returns True.
        """
        going_on = bool(self.waiting(group))
        while going_on:
            yield from self.arrived(group)
            if time.monotonic() > deadline():
                return
            going_on = more() or bool(self.waiting(group))
            if going_on:
                time.sleep(max(POLL_SECONDS, _POLL_SECONDS_EACH * len(self._open)))

    def waiting(self, group: str) -> list[int]:
        """Nodes that have not answered the messages of a group."""
        return [sent.node_id for sent in self.open(group)]

    def open(self, group: str) -> list[Sent]:
        """Messages of a group that are not answered."""
        return [sent for sent in self._open.values() if sent.group == group]

    def forget(self, group: str, node_id: int | None = None) -> list[int]:
        """Give up on a group's unanswered messages, or on one node's; returns the nodes. See `late`."""
        late = {i: s for i, s in self._open.items() if s.group == group and node_id in (None, s.node_id)}
        self._open = {i: sent for i, sent in self._open.items() if i not in late}
        self._late |= late
        return [sent.node_id for sent in late.values()]

    def late(self, lifetime: float) -> Iterator[Sent]:
        """Messages that were given up on and whose replies have arrived since; the replies are dropped.

        Args:
            lifetime: seconds after which a reply can no longer arrive.
        """
        now = time.time()
        self._late = {i: sent for i, sent in self._late.items() if now < sent.at + lifetime}
        for message_id in list(self._late):
            for reply in self._pull(message_id):
                sent = self._late.pop(message_id)
                if not reply.has_error():  # e.g. that the node is gone
                    yield sent
