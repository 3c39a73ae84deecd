"""A picture of a partition: sites against labels; a dot's area is the site's number of rows with the label."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS, _MOST_SITES = 30, 24  # more labels become one line; more sites are not named
_LARGEST = 160.0  # area of the largest dot, points squared
_LETTER = 0.09  # inches that a letter takes at most, on average


def draw(sites: Mapping[str, Mapping[str, int]], *, ink: str = "black", name: Callable[[str], str] = str) -> "Figure":
    """Draw the labels from top to bottom, those with most rows first; above each site, all of its rows.

    Args:
        sites: number of rows per label, by site.
        ink: color of the dots.
        name: makes the text for the name of a site or label.
    """
    from matplotlib.figure import Figure

    totals: dict[str, int] = {}
    for counts in sites.values():
        for label, count in counts.items():
            totals[label] = totals.get(label, 0) + count
    order = sorted(totals, key=lambda label: (-totals[label], label))
    few = order[:_MOST_LABELS] if len(order) > _MOST_LABELS + 1 else order
    rest = order[len(few) :]
    lines = [*map(name, few), *([f"{len(rest)} more"] if rest else [])]
    dots = [
        (x, y, count)
        for x, counts in enumerate(sites.values())
        for y, count in enumerate([*(counts.get(n, 0) for n in few), sum(counts.get(n, 0) for n in rest)])
        if count
    ]
    most = max((count for *_, count in dots), default=1)
    places = range(len(sites)) if len(sites) <= _MOST_SITES else range(0)
    heads = [f"{sum(counts.values()):,}" for counts in sites.values()]
    feet = [name(site) for site in sites]
    beside = _LETTER * max(map(len, lines), default=0)
    above = _LETTER * (max(map(len, heads)) + max(map(len, feet))) if places else 0.0
    size = (min(10.4, max(3.6, 0.5 + beside + 0.34 * len(sites))), 0.9 + above + 0.26 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    area = [_LARGEST * count / most for *_, count in dots]
    axes.scatter([x for x, *_ in dots], [y for _, y, _ in dots], s=area, color=ink, linewidths=0)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(-0.7, len(sites) - 0.3)
    axes.set_xticks(places, feet if places else [], rotation=90)
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, heads if places else [], rotation=90)
    figure.supxlabel(f"{len(sites)} sites; the largest dot: {most:,} rows", fontsize="medium")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    top.spines[["top"]].set_visible(False)
    for one in (axes, top):
        one.tick_params(length=0)
    return figure


def write_svg(file: Path, sites: Mapping[str, Mapping[str, int]]) -> None:
    """Draw into a file; the same bytes for the same numbers."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "fedspan", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}):
        draw(sites, name=_short).savefig(file, metadata={"Date": None, "Creator": "FedSpan"})


def _short(name: str) -> str:
    plain = " ".join(name.split())
    return plain if len(plain) <= 40 else f"{plain[:39]}…"
