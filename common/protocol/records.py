"""Read the records of a message without a memory trap in Flower.

Flower's ``content.array_records``, ``metric_records`` and ``config_records`` make a reference cycle with ``content``:
after one use every tensor of the message stays in memory until the next garbage collection. The functions here make no
cycle (decision 008).
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
