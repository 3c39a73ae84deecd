"""Calls to the SuperLink: one question for all open replies, and again when a call fails (decision 035)."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx
from flwr.app import Message
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.superlink.grid.http_grid import HttpGrid

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
#: Failures of a call that may succeed the next time. Flower itself tries again where no SuperLink answers at all.
FAILURES = (httpx.HTTPError, ObjectPushError, ObjectPullError)
_WAITS = (0.2, 1.0, 3.0, 10.0, 30.0)  # seconds before a failed call is made again


class SuperLinkLost(Exception):  # noqa: N818 - it names what happened
    """Calls to the SuperLink fail for good. Not the run's end: the supervisor submits it again (decision 011)."""


def patient(call: Callable[[], Answer]) -> Answer:
    """Make a call, several times if it fails.

    Raises:
        SuperLinkLost: it failed each time.
    """
    for wait in _WAITS:
        try:
            return call()
        except FAILURES as error:
            log.warning("a call to the SuperLink failed and is made again in %g seconds: %s", wait, error)
            time.sleep(wait)
    try:
        return call()
    except FAILURES as error:
        raise SuperLinkLost(f"{len(_WAITS) + 1} calls to the SuperLink failed, the last one with: {error}") from error


def answered(grid: Grid, message_ids: Sequence[str]) -> dict[str, Callable[[], list[Message]]]:
    """Which messages may be answered, and for each a function that pulls its reply, if there is one.

    Flower's ``pull_messages`` asks for several messages at once, too, but then holds all their replies in memory
    (decision 008). Here the question is one, and each reply's content comes when it is pulled. A pull that failed may
    be made again.
    """
    if not message_ids:
        return {}
    if not isinstance(grid, HttpGrid):
        return {i: lambda i=i: list(grid.pull_messages([i])) for i in message_ids}  # type: ignore[misc]
    client = grid._runtime_client
    told = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
    found: dict[str, Callable[[], list[Message]]] = {}
    for reply, tree in zip(told.messages_list, told.message_object_trees, strict=True):
        one = copy.copy(grid)
        answer: Any = _Told(client, PullAppMessagesResponse(messages_list=[reply], message_object_trees=[tree]))
        one._client = answer
        asked = reply.metadata.reply_to_message_id
        found[asked] = lambda one=one, asked=asked: list(one.pull_messages([asked]))  # type: ignore[misc]
    return found


class _Told:
    """A client of the SuperLink's Runtime API that knows the answer to one question already."""

    def __init__(self, client: object, answer: PullAppMessagesResponse) -> None:
        self._client, self._answer = client, answer

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def PullMessages(self, _: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        """The reply's head; its content is pulled with the client's other calls."""
        return self._answer
