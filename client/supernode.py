"""``flower-supernode`` with three differences, for a long-lived worker beside it.

    python -m client.supernode --poll 0.5 [options of flower-supernode]

It asks its SuperLink for messages as often as it is told; Flower 1.39 waits three seconds between two questions, which
on a near link is most of a short round. When a run is stopped while its message is still coming in, the task that was
made of the message ends; Flower 1.39 keeps it, and whoever takes it up waits for its content for ever. And it asks for
the next message when the last one is answered; Flower 1.39 when anything is, so an answer to a run that was stopped
meanwhile leaves the next answer lying there until one more message has come.

Like ``client.worker`` this file imports nothing of FedSpan.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

_receive, _send = start_client_internal._pull_and_store_message, start_client_internal._push_messages


def _pull_objects(*arguments: Any, **options: Any) -> dict[str, bytes]:  # noqa: ANN401 - as Flower's own
    """Flower's ``pull_objects``, whose caller cleans up after any error but the one that a stopped run raises."""
    try:
        return pull_objects(*arguments, **options)
    except RunNotRunningException:
        raise ConnectionAbortedError("the run was stopped") from None


class _Turns:
    """Receives a message, sends its answer, and only then receives the next."""

    def __init__(self) -> None:
        self._received = ""

    def receive(self, *, receive: Callable[[], tuple[Message, Any] | None], **rest: Any) -> int | None:  # noqa: ANN401
        """Flower's ``_pull_and_store_message``."""

        def noted() -> tuple[Message, Any] | None:
            found = receive()
            if found is not None:
                self._received = found[0].metadata.message_id
            return found

        return _receive(receive=noted, **rest)

    def answer(self, *, state: Any, **rest: Any) -> None:  # noqa: ANN401
        """Flower's ``_push_messages``: waits for an answer, sends all that are there, forgets what they answer."""
        _send(state=state, **rest)
        while self._received in state.msg_store:
            _send(state=state, **rest)


class _Clock:
    """The time module as that one file of Flower's sees it."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep, but not longer than the longest pause."""
        time.sleep(min(seconds, self._longest))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m client.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--poll", type=float, default=3.0)
    options, rest = parser.parse_known_args()
    if not 0.05 <= options.poll <= 60.0:
        parser.error(f"--poll is {options.poll:g}; allowed: 0.05 to 60 seconds")
    start_client_internal.time = _Clock(options.poll)  # type: ignore[attr-defined, assignment]
    start_client_internal.pull_objects = _pull_objects  # type: ignore[attr-defined]
    turns = _Turns()
    start_client_internal._pull_and_store_message = turns.receive  # type: ignore[assignment]
    start_client_internal._push_messages = turns.answer  # type: ignore[assignment]
    sys.argv = ["flower-supernode", *rest]
    flower_supernode()


if __name__ == "__main__":
    main()
