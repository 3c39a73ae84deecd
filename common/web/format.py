"""How pages write numbers; a value that is not there is a dash, and a unit stays beside its number."""

import math
import time

from common import text as units


def size(count: float | None) -> str:
    """Bytes."""
    return "–" if count is None else units.size(count).replace(" ", "\u00a0")


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


def whole(value: float | None) -> str:
    """A count."""
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Seconds with one decimal."""
    return "–" if value is None else f"{value:,.1f}"


def utc(moment: float) -> str:
    """Unix seconds as date and time of day."""
    return time.strftime("%Y-%m-%d\u00a0%H:%M:%S\u00a0UTC", time.gmtime(moment))


def duration(lasted: float | None) -> str:
    """Seconds as people say them: 40 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if lasted is None:
        return "–"
    whole_ = max(round(lasted), 0)
    if whole_ < 60:
        return f"{whole_}\u00a0s"
    if whole_ < 3600:
        return f"{whole_ // 60}\u00a0min\u00a0{whole_ % 60:02d}\u00a0s"
    minutes = whole_ // 60
    if minutes < 48 * 60:
        return f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02d}\u00a0min"
    return f"{minutes // 1440}\u00a0d\u00a0{minutes // 60 % 24}\u00a0h"
