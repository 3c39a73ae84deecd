"""Ages of updates, and who was busy, where slow sites go on while the others begin the next round."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def ages(metrics: Iterable[Mapping[str, Any]], site: str | None = None) -> dict[int, int]:
    """Number of updates by age: how many rounds were finished while their sites trained.

    Args:
        metrics: the run's metrics.
        site: count the updates of this site alone; None: of all.
    """
    trained = (record for record in metrics if record["phase"] == "train" and site in (None, record["client"]))
    return dict(sorted(Counter(int(record.get("age", 0)) for record in trained).items()))


def with_busy(outcomes: Mapping[int, str], *, buffered: bool) -> dict[int, str]:
    """A site's outcomes by round, with "busy" for the rounds in which it had the work of an earlier one."""
    found, before = dict(outcomes), ""
    for number, outcome in found.items():
        if buffered and outcome == "absent" and before in ("asked", "busy"):
            found[number] = "busy"
        before = found[number]
    return found
