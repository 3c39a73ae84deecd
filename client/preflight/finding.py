"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "FAIL", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        level: ok, warning or FAIL; only ``FAIL`` keeps a site from taking part.
        found: the finding in words; never content of a shard.
        mend: the remedy.
    """

    level: Level
    found: str
    mend: str = ""


class Skip(Exception):  # noqa: N818 - nothing is wrong
    """A check cannot run; the text names the missing option or file."""
