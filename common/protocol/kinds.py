"""Kinds of values that come from the other side: the allowed values, in words and as a test."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import WireError
from common.text import one_line

_SHOWN = 80  # characters of the other side's value that an error shows


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        allowed: the allowed values, in words.
        holds: test whether a value is allowed.
        taken: makes the value to use from an allowed value.
    """

    allowed: str
    holds: Callable[[object], bool]
    taken: Callable[[Any], Any] = lambda value: value

    def check(self, name: str, value: object) -> Any:  # noqa: ANN401 - the test knows its type
        """Return the value if it is allowed.

        Raises:
            WireError: the value is not allowed; the text begins with ``name``.
        """
        if not self.holds(value):
            raise WireError(f"{name} is {short(value)}; allowed: {self.allowed}")
        return self.taken(value)


def short(value: object) -> str:
    """A value from the other side for an error's text: quoted, and cut to less than a line."""
    shown = repr(value)
    return one_line(shown) if len(shown) <= _SHOWN else f"{one_line(shown[:_SHOWN])}... ({len(shown)} characters)"


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


def blob(longest: int) -> Kind:
    """Bytes, at most ``longest`` of them."""
    return Kind(f"up to {longest} bytes", lambda v: isinstance(v, bytes) and len(v) <= longest)


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


def _number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]


def share(least: float) -> Kind:
    """Numbers from ``least`` to 1; what rounding adds is taken away again."""
    return Kind(
        f"a number from {least:g} to 1",
        lambda v: _number(v, least - _ROUNDING, 1 + _ROUNDING),
        lambda v: min(max(float(v), least), 1.0),
    )


_MOST, _DIVERGED, _ROUNDING = 1e15, 1e9, 1e-6
FLAG = Kind("true or false", lambda v: type(v) is bool)
AMOUNT = Kind(f"a number from 0 to {_MOST:g}", lambda v: _number(v, 0.0, _MOST))
POSITIVE = Kind(f"a positive number up to {_MOST:g}", lambda v: _number(v, math.ulp(0.0), _MOST))
#: A loss. The loss of a diverged model overflows; all such losses are read as infinite.
LOSS = Kind(
    f"a number from 0; above {_DIVERGED:g}, and nan, as infinite: the model has diverged",
    lambda v: type(v) in (int, float) and not v < 0,  # type: ignore[operator]
    lambda v: v if v <= _DIVERGED else math.inf,
)
