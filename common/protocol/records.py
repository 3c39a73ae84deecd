"""The records of a message without a trap of Flower's.

``content.array_records`` and its sisters make a reference cycle with ``content``, so that after their use every tensor
of a message stays in memory until the next garbage collection. What is here does not.
"""

from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)


def get_records(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """The records of one kind, by key."""
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def get_record(content: RecordDict, key: str, kind: type[R]) -> R:
    """The record of this kind under ``key``; an empty one when there is none."""
    found = content.get(key)
    return found if isinstance(found, kind) else kind()
