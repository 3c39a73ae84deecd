"""What a check finds."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "FAIL", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: how bad it is; only ``FAIL`` keeps a site from taking part.
        found: what is there; never content of a shard.
        mend: what to do about it.
    """

    level: Level
    found: str
    mend: str = ""


class Skip(Exception):  # noqa: N818 - nothing is wrong
    """A check has nothing to look at; the text says what it would need."""
