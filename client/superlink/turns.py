"""A SuperNode's work between two messages, where it differs from Flower 1.39.

- ``--poll`` sets the longest pause between two polls for messages. Flower waits three seconds, which on a fast link is
  most of a short round. FedSpan's SuperLink answers a poll when there is a message, or after seconds; then there is no
  pause. The worker, too, is answered when a message has come, and an answer is sent when it is complete (decision 035).
- When a run is stopped while a message of it is still being pulled, the message's task ends. Flower keeps the task, and
  the worker that takes it waits for the content for ever.
- A message whose worker died before it had pulled it, or ended before its answer was complete, is answered with an
  error, as any other. Flower waits for ever.
- The next message is pulled when the last one is answered. Flower pulls it after any answer: an answer to a stopped run
  then delays the next answer until one more message has come.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.address import parse_address
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.servicer.runtime import runtime_handlers

from client.superlink.dial import socket_path
from client.watch.link_state import LinkState

_LOOKS = 0.5  # seconds between two looks for an answer; as Flower's
_HELD = 0.5  # seconds after which a poll's empty answer was held back by the SuperLink
_WORKER_WAITS = 1.0  # seconds that a worker's question for work is held back; Flower's stop waits for it
_receive, _send = start_client_internal._pull_and_store_message, start_client_internal._push_messages
_acquire, _complete = runtime_handlers.acquire_task, runtime_handlers.push_task_output
_answer_for_dead = InMemoryNodeState._on_task_tokens_expired


def _pull_objects(*arguments: Any, **options: Any) -> dict[str, bytes]:  # noqa: ANN401 - as Flower's own
    """Flower's ``pull_objects``; its caller cleans up after any error except that of a stopped run (decision 011)."""
    try:
        return pull_objects(*arguments, **options)
    except RunNotRunningException:
        raise ConnectionAbortedError("the run was stopped") from None


def _answers(state: InMemoryNodeState) -> list[Message]:
    """Answers that are still to be sent, complete or not."""
    with state.lock_msg_store:
        left = [entry.message for entry in state.msg_store.values() if not entry.is_retrieved]
    return [message for message in left if message.metadata.reply_to_message_id]


def _is_complete(state: InMemoryNodeState, answer: Message) -> bool:
    """Whether the worker has handed over all contents of an answer."""
    try:
        tree = state.object_store.get_object_tree(answer.metadata.message_id)
    except NoObjectInStoreError:
        return False
    return all(state.object_store.get(part.object_id) for part in iterate_object_tree(tree))


def _on_tasks_expired(state: InMemoryNodeState, tasks: list[Any]) -> None:
    """Flower's ``_on_task_tokens_expired``; it answers only what a dead worker had pulled, and not begun to answer."""
    runs = {task.run_id for task in tasks}
    with state.lock_msg_store:
        for name, entry in list(state.msg_store.items()):
            metadata = entry.message.metadata
            if metadata.run_id in runs and not metadata.reply_to_message_id:
                entry.is_retrieved = True
            elif metadata.run_id in runs and not entry.is_retrieved and not _is_complete(state, entry.message):
                del state.msg_store[name]
    _answer_for_dead(state, tasks)


def _parse_address(address: str) -> tuple[str, int | str, bool | None] | None:
    """Flower's ``parse_address`` (host, port, whether the host is IPv6), extended by Unix sockets."""
    path = socket_path(address)
    return parse_address(address) if path is None else ("unix", str(path), None)


class Turns:
    """Receives a message, sends the answer to it, and only then receives the next message.

    Args:
        state: is told that the link is up.
        longest: seconds of the longest pause.
    """

    def __init__(self, state: LinkState, longest: float) -> None:
        self._received, self._state, self._longest = "", state, longest
        self._ready, self._answered = threading.Event(), threading.Event()
        self._held = False  # the last poll's answer was held back

    def receive(self, *, receive: Callable[[], tuple[Message, Any] | None], **rest: Any) -> int | None:  # noqa: ANN401
        """Flower's ``_pull_and_store_message``."""

        def noted() -> tuple[Message, Any] | None:
            asked = time.monotonic()
            found = receive()
            self._state.up()
            self._held = found is None and time.monotonic() - asked > _HELD
            if found is not None:
                self._received = found[0].metadata.message_id
            return found

        run_id = _receive(receive=noted, **rest)
        if run_id is not None:
            self._ready.set()
        return run_id

    def answer(self, *, state: Any, **rest: Any) -> None:  # noqa: ANN401
        """Flower's ``_push_messages`` (wait for an answer, send all), until the received message is answered.

        Flower begins to send an answer of which contents are still to come, and then waits for them.
        """
        while True:
            while not self._is_ready(state):
                self.sleep(_LOOKS)
                state.get_messages(run_ids=[])  # answers for a worker that is dead
            _send(state=state, **rest)
            if self._received not in state.msg_store:
                return

    @staticmethod
    def _is_ready(state: InMemoryNodeState) -> bool:
        """Whether there is an answer, and all that there are are complete."""
        answers = _answers(state)
        return bool(answers) and all(_is_complete(state, answer) for answer in answers)

    def acquire(self, request: AcquireTaskRequest, state: Any) -> AcquireTaskResponse:  # noqa: ANN401
        """Flower's ``acquire_task``, for the worker: answered when a message has come, or after a second."""
        self._ready.wait(_WORKER_WAITS)
        self._ready.clear()
        return _acquire(request, state)

    def complete(self, request: Any, state: Any, task: Any) -> Any:  # noqa: ANN401
        """Flower's ``push_task_output``, the worker's last word on a message: nothing more comes of its answer."""
        done = _complete(request, state, task)
        if not all(_is_complete(state, answer) for answer in _answers(state)):
            _on_tasks_expired(state, [task])
        self._answered.set()
        return done

    def sleep(self, seconds: float) -> None:
        """Wait for an answer of the worker, but not longer than the longest pause."""
        if not self._held:
            self._answered.wait(min(seconds, self._longest))
            self._answered.clear()
        self._held = False

    def install(self) -> None:
        """Put all of this in the place of Flower's own, which a program does once."""
        start_client_internal.parse_address = _parse_address  # type: ignore[attr-defined, assignment]
        start_client_internal.time = self  # type: ignore[attr-defined, assignment]
        start_client_internal.pull_objects = _pull_objects  # type: ignore[attr-defined]
        start_client_internal._pull_and_store_message = self.receive  # type: ignore[assignment]
        start_client_internal._push_messages = self.answer  # type: ignore[assignment]
        InMemoryNodeState._on_task_tokens_expired = _on_tasks_expired  # type: ignore[assignment, method-assign]
        runtime_handlers.acquire_task, runtime_handlers.push_task_output = self.acquire, self.complete

    def __getattr__(self, name: str) -> object:
        """As the time module, for Flower's loop."""
        return getattr(time, name)
