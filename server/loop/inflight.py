"""Messages in flight: sent, and waiting for a reply. Replies are yielded one at a time, as they arrive."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid

from common.errors import WireError, WorkerDied
from common.protocol.messages import Failure
from server.loop.transport import FAILURES, answered, patient

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # the SuperLink is on this machine: asking costs little
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


class _Pull:
    """Pulls the reply to one message from the SuperLink, in a thread.

    Flower's pull blocks until a reply is uploaded completely, up to two hours over a slow link. In the server's main
    thread one slow site would hold up all others and the deadline (decision 010).

    Attributes:
        over: the pull has ended well, with a reply or without.
    """

    def __init__(self, pull: Callable[[], list[Message]]) -> None:
        self.over = False
        self._pull = pull
        self._thread: threading.Thread | None = None
        self._found: list[Message] = []
        self._error: Exception | None = None

    def reply(self) -> list[Message]:
        """The reply, if it is there; else no message, and a pull that failed on the way is made again next time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            self._thread.join(_PULL_SECONDS)
        if self._thread.is_alive():
            return []
        self._thread, found, error = None, self._found, self._error
        self._found, self._error = [], None
        if isinstance(error, FAILURES):
            log.warning("a reply could not be pulled, and is pulled again: %s", error)
            return []
        if error is not None:
            raise error
        self.over = True
        return found

    def _run(self) -> None:
        try:
            self._found = self._pull()
        except Exception as error:  # noqa: BLE001 - raised where the reply is asked for
            self._error = error


class InFlight:
    """Sends messages and yields their replies, one at a time and each once."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, Sent] = {}
        self._late: dict[str, Sent] = {}
        self._pulls: dict[str, _Pull] = {}  # by message id: not begun, or the upload goes on, or the last one failed
        self._undelivered: list[tuple[Sent, Message]] = []  # messages whose node left just before, with the error

    def push(self, messages: Iterable[Message], group: str) -> None:
        """Send messages to the SuperLink; one that it does not take is answered as by a node that is gone.

        Raises:
            SuperLinkLost: the SuperLink does not answer, or does not take what belongs to the messages.
        """
        outgoing = list(messages)
        ids = patient(lambda: list(self._grid.push_messages(outgoing)))
        now = time.time()
        for message_id, message in zip(ids, outgoing, strict=True):
            sent = Sent(message.metadata.dst_node_id, group, now)
            if message_id:
                self._open[message_id] = sent
            else:
                self._undelivered.append(
                    (sent, create_message_error_unavailable_res_message(message.metadata, "node_unavail"))
                )

    def arrived(self, group: str) -> Iterator[tuple[Sent, Message]]:
        """The replies of a group that have arrived by now."""
        gone = [(sent, error) for sent, error in self._undelivered if sent.group == group]
        self._undelivered = [(sent, error) for sent, error in self._undelivered if sent.group != group]
        yield from gone
        asked = [i for i, sent in self._open.items() if sent.group == group]
        for message_id in self._answered(asked):
            replies = self._pull(message_id)
            if replies:
                yield self._open.pop(message_id), replies.pop()

    def _answered(self, message_ids: list[str]) -> list[str]:
        """Those messages whose replies may be pulled; the SuperLink is asked once for all."""
        new = [i for i in message_ids if i not in self._pulls]
        self._pulls |= {i: _Pull(pull) for i, pull in patient(lambda: answered(self._grid, new)).items()}
        return [i for i in message_ids if i in self._pulls]

    def _pull(self, message_id: str) -> list[Message]:
        """The reply to a message, if it has arrived."""
        pull = self._pulls[message_id]
        replies = pull.reply()
        if pull.over:
            del self._pulls[message_id]
        return replies

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
                time.sleep(POLL_SECONDS)

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
        self._pulls = {i: pull for i, pull in self._pulls.items() if i in self._open or i in self._late}
        for message_id in self._answered(list(self._late)):
            for reply in self._pull(message_id):
                sent = self._late.pop(message_id)
                if not reply.has_error():  # e.g. that the node is gone
                    yield sent
