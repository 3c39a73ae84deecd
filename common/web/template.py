"""Fills templates; text of others becomes no markup."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.web.format import duration, precise, score, seconds, size, utc, whole

_HERE = Path(__file__).parent  # the shell and its style are here
_FILTERS = (score, precise, whole, seconds, size, utc, duration)


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        id: anchor of the heading.
        short: title in the list of sections; ``title``: heading.
        html: the rest, below the heading.
    """

    id: str
    short: str
    title: str
    html: Markup


def fill(template: Path, **values: object) -> Markup:
    """The text that a Jinja template makes of values."""
    return Markup(_environment(template.parent).get_template(template.name).render(**values))  # noqa: S704 - escaped


def page(title: str, head: Markup, sections: Sequence[Section]) -> str:
    """A whole page, in one file that needs nothing else.

    Args:
        title: the window's title.
        head: text above the list of sections, with the page's <h1>.
        sections: in order.
    """
    return str(fill(_HERE / "page.html", title=title, head=head, sections=sections, live=False))


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {f.__name__: f for f in _FILTERS}
    return environment
