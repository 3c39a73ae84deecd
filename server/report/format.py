"""How the report writes numbers; a value that is not there is a dash."""

import math
import time

from common import text as units
from server.run import records


def size(count: float | None) -> str:
    """Bytes."""
    return "–" if count is None else units.size(count)


def score(value: float | None) -> str:
    """A score or loss with three decimals, large ones with none."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}".replace("-", "−")


def precise(value: float | None) -> str:
    """A number that may be tiny without being zero."""
    tiny = value is not None and 0 < abs(value) < 5e-4
    return f"{value:.1e}" if tiny else score(value)


def delta(change: records.Change) -> str:
    """A change in words and an arrow that shows where the number went."""
    if change.before is None or change.after is None:
        return "not comparable"
    if change.verdict == "same":
        return "unchanged"
    arrow = "▲" if change.after > change.before else "▼"
    return f"{arrow} {score(abs(round(change.after, 3) - round(change.before, 3)))} {change.verdict}"


def whole(value: float | None) -> str:
    """A count."""
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Seconds with one decimal."""
    return "–" if value is None else f"{value:,.1f}"


def utc(moment: float) -> str:
    """Unix seconds as date and time of day."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
