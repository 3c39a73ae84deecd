"""Sites that answer as they like, among true ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict

from server.run.folder import read_lines
from tests.harness.fake_sites import NAME, Site

THREE = {"cohort": {"min_clients": 3, "round_deadline": 30.0}}
LEFT = f"{NAME}/left"


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "run" / "events.jsonl") if event["event"] in kinds]


class Hostile(Site):
    """Answers the messages of one kind as it likes, and all others as a true site does."""

    def __init__(
        self, number: int, answer: Callable[[Message, Message], Message], kind: str = MessageType.TRAIN
    ) -> None:
        super().__init__(number)
        self._answer, self._kind = answer, kind

    def reply(self, message: Message) -> Message:
        reply = super().reply(message)
        return self._answer(message, reply) if message.metadata.message_type == self._kind else reply


def says(code: int, reason: str) -> Callable[[Message, Message], Message]:
    return lambda message, _: Message(Error(code, reason), reply_to=message)


def tells(**numbers: float) -> Callable[[Message, Message], Message]:
    """A true update, with other numbers beside it."""

    def answer(message: Message, reply: Message) -> Message:
        told = {**reply.content["metrics"], **{key.replace("__", "."): number for key, number in numbers.items()}}
        return Message(RecordDict({**reply.content, "metrics": MetricRecord(told)}), reply_to=message)  # type: ignore[dict-item]

    return answer


def sends(**arrays: Array) -> Callable[[Message, Message], Message]:
    def answer(message: Message, reply: Message) -> Message:
        content = {**reply.content, "arrays": ArrayRecord({**reply.content["arrays"], **arrays})}  # type: ignore[dict-item]
        return Message(RecordDict(content), reply_to=message)

    return answer


def honest() -> list[Site]:
    return [Site(1), Site(2), Site(3)]
