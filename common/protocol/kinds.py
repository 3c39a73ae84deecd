"""Kinds of values that come from the other side: the allowed values, in words and as a test."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import WireError

_SHOWN = 80  # characters of the other side's value that an error shows


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        allowed: the allowed values, in words.
        holds: test whether a value is allowed.
    """

    allowed: str
    holds: Callable[[object], bool]

    def check(self, name: str, value: object) -> Any:  # noqa: ANN401 - the test knows its type
        """Return the value if it is allowed.

        Raises:
            WireError: the value is not allowed; the text begins with ``name``.
        """
        if not self.holds(value):
            raise WireError(f"{name} is {short(value)}; allowed: {self.allowed}")
        return value


def short(value: object) -> str:
    """A value from the other side for an error's text: quoted, and cut to less than a line."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}... ({len(shown)} characters)"


def whole(least: int) -> Kind:
    """Whole numbers from ``least`` up to 2^53, which a float holds exactly."""
    return Kind(f"a whole number from {least}", lambda v: type(v) is int and least <= v <= 2**53)


def text(longest: int) -> Kind:
    """Non-empty text of at most ``longest`` characters."""
    return Kind(f"text of 1 to {longest} characters", lambda v: isinstance(v, str) and 0 < len(v) <= longest)


def line(longest: int) -> Kind:
    """Non-empty text for one line of a page, a log or a terminal: no control characters."""
    allowed = f"text of 1 to {longest} printable characters"
    return Kind(allowed, lambda v: isinstance(v, str) and 0 < len(v) <= longest and v.isprintable())


def one_line(text: str) -> str:
    """Text from the other side on one line; control characters are escaped, so that they cannot command a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def matching(pattern: str, allowed: str) -> Kind:
    """Text that matches a pattern from end to end."""
    return Kind(allowed, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


def names(longest: int, most: int) -> Kind:
    """A list of at most ``most`` different names, each of at most ``longest`` characters."""
    one = line(longest)
    return Kind(
        f"a list of up to {most} different names of 1 to {longest} printable characters",
        lambda v: isinstance(v, list) and len(v) <= most and all(map(one.holds, v)) and len({*v}) == len(v),
    )


def _number(least: float, value: object) -> bool:
    return type(value) in (int, float) and least <= value < math.inf  # type: ignore[operator]


FLAG = Kind("true or false", lambda v: type(v) is bool)
NUMBER = Kind("a number", lambda v: type(v) in (int, float))  # such as a loss, which overflows when training diverges
AMOUNT = Kind("a finite number from 0", lambda v: _number(0.0, v))
POSITIVE = Kind("a positive number", lambda v: _number(math.ulp(0.0), v))
