"""Fills templates; text of others becomes no markup. And a page made of sections, written to a file or served live."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.web.format import duration, precise, score, seconds, size, utc, whole

_HERE = Path(__file__).parent  # the shell and its style are here
_FILTERS = (score, precise, whole, seconds, size, utc, duration)
SCRIPT = (_HERE / "live.js").read_text(encoding="utf-8")


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

    @property
    def body(self) -> Markup:
        """Heading and rest."""
        return Markup('<h2 id="{}">{}</h2>\n{}').format(self.id, self.title, self.html)


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: the window's title.
        head: text above the list of sections, with the page's <h1>.
        sections: in order.
    """

    title: str
    head: Markup
    sections: Sequence[Section]

    @cached_property
    def parts(self) -> dict[str, Markup]:
        """All that can change while a page is shown, by its name."""
        return {"head": self.head, **{section.id: section.body for section in self.sections}}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of each part, by which a browser says what it has."""
        return {name: hashlib.sha256(html.encode()).hexdigest()[:16] for name, html in self.parts.items()}

    def html(self, *, live: bool = False) -> str:
        """The whole page, in one file that needs nothing else.

        Args:
            live: with the script that brings it up to date.
        """
        script = Markup(SCRIPT) if live else ""  # noqa: S704 - our own file
        return str(fill(_HERE / "page.html", title=self.title, page=self, live=script))


def fill(template: Path, **values: object) -> Markup:
    """The text that a Jinja template makes of values."""
    return Markup(_environment(template.parent).get_template(template.name).render(**values))  # noqa: S704 - escaped


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
