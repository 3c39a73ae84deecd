"""Fills a page's template; text of others becomes no markup."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.report.format import delta, precise, score, seconds, size, utc, whole

_HERE = Path(__file__).parent  # style.css is here


def fill(template: Path, **values: object) -> str:
    """The page that a Jinja template makes of values."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {f.__name__: f for f in (score, precise, whole, seconds, size, utc, delta)}
    return environment.get_template(template.name).render(**values)
