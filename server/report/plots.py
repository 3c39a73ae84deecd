"""The report's figures as inline SVG: the same bytes for the same numbers, colours left to the page's style sheet.

Every colour is drawn as a placeholder that becomes a CSS variable (``--plot-ink``, ``--plot-0`` ...), so one figure
serves light, dark and paper. Lines differ in dash and marker and bars in hatching, so no figure needs colour.
"""

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from server.run.records import PHASES, SERVER, Bar

INK, _GRID, _PAPER = "#0a0b00", "#0a0b01", "#0a0b02"
_VARIABLES = {INK: "--plot-ink", _GRID: "--plot-grid", _PAPER: "--paper"}
_COLOURS = 8  # --plot-0 to --plot-7
DASHES = ("--", "-.", ":", (0, (6, 1.5)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "s^Dv<>PX"
_HATCHES = dict(zip(PHASES, ("////", "..", "", "\\\\\\\\", "xxxx", "", "||||"), strict=True))
_MOST_LINES = 8  # more sites than that are drawn alike
_DWARFS = 10  # a line more than this many times as high as the median line is cut off at the axis's end
_ABOVE = 1.1  # end of the axis, as a multiple of the highest of the other lines
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be searched and read aloud
    "text.parse_math": False,  # a $ in a site's name is a $
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": _GRID,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "hatch.color": _PAPER,
}


def curves(lines: Mapping[str, Mapping[int, float]], *, name: str, axis: str, label: str, from_zero: bool) -> str:
    """One line per evaluation set over the rounds; the server's is solid and thick.

    Args:
        lines: value by version (number of training rounds), by site or server that measured it.
        name: the figure's name, unique on the page.
        axis: label of the y axis.
        label: the figure in words, for people who cannot see it.
        from_zero: start the y axis at 0.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        names = [who for who in lines if who != SERVER]
        for number, who in enumerate(names):
            _line(axes, lines[who], number if len(names) <= _MOST_LINES else None, who if number == 0 else None, names)
        if SERVER in lines:
            _draw(axes, lines[SERVER], color=INK, linestyle="-", linewidth=2.2, marker="o", label="server's set")
        axes.set_xlabel("rounds of training behind the model (0: base model)")
        axes.set_ylabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        axes.grid(axis="y", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if from_zero:
            axes.set_ylim(bottom=0)
        beyond = dwarfing(lines)
        if beyond:
            rest = [value for who, values in lines.items() if who not in beyond for value in values.values()]
            axes.set_ylim(0, _ABOVE * max(rest))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside upper left", ncols=min(4, len(labels)), handlelength=3.2
        )
        return inline(figure, name, label)


def dwarfing(lines: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Names of the lines far above the median line, which would flatten all other lines."""
    tops = {who: max(values.values()) for who, values in lines.items()}
    usual = statistics.median_low(tops.values())
    return [who for who, top in tops.items() if top > _DWARFS * usual > 0]


def time_bars(bars: Sequence[Bar], *, name: str, label: str) -> str:
    """One stacked bar per round and site, rounds apart; round 0 stands for a mean over all rounds."""
    with mpl.rc_context(STYLE):
        rounds = sorted({bar.round for bar in bars})
        figure = Figure(figsize=(5.2, 0.9 + 0.2 * len(bars) + 0.3 * len(rounds)), layout="constrained")
        axes = figure.add_subplot()
        heights: list[float] = []
        height = 0.0
        for before, bar in zip([None, *bars], bars, strict=False):
            if before is None or before.round != bar.round:
                height += 1.0
                axes.text(
                    0, height - 0.05, f"round {bar.round}" if bar.round else "mean round", va="center", weight="bold"
                )
                height += 0.9
            heights.append(height)
            height += 1.0
        for number, phase in enumerate(PHASES):
            left = [sum(bar.seconds.get(p, 0.0) for p in PHASES[:number]) for bar in bars]
            width = [bar.seconds.get(phase, 0.0) for bar in bars]
            if any(width):
                axes.barh(heights, width, left=left, height=0.78, **_fill(number, phase))
        axes.set_yticks(heights, [short(bar.who) for bar in bars])
        axes.set_ylim(height, 0.2)
        axes.set_xlabel("seconds")
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        used = [(n, p) for n, p in enumerate(PHASES) if any(bar.seconds.get(p) for bar in bars)]
        keys = [Patch(label=phase, **_fill(number, phase)) for number, phase in used]
        figure.legend(handles=keys, loc="outside upper left", ncols=4, handlelength=2.2, handleheight=1.0)
        return inline(figure, name, label)


def _fill(number: int, phase: str) -> dict[str, Any]:
    """How a phase's bars are filled."""
    return {"facecolor": colour(number), "hatch": _HATCHES[phase], "edgecolor": _PAPER, "linewidth": 0.5}


def _line(axes: Axes, values: Mapping[int, float], number: int | None, first: str | None, names: list[str]) -> None:
    """Draw a site's line; without ``number`` all lines look the same, and the legend shows ``first`` for all."""
    if number is None:
        label = f"sites ({len(names)})" if first else None
        _draw(axes, values, color=colour(0), linestyle="-", linewidth=0.7, marker="", label=label)
    else:
        _draw(
            axes,
            values,
            color=colour(number),
            linestyle=DASHES[number % len(DASHES)],
            linewidth=1.4,
            marker=MARKERS[number],
            label=short(names[number]),
        )


def _draw(axes: Axes, values: Mapping[int, float], **style: Any) -> None:  # noqa: ANN401 - matplotlib's own
    style.setdefault("markersize", 4.5)
    axes.plot(list(values), list(values.values()), **style)


def colour(number: int) -> str:
    """The placeholder of a line's colour."""
    return f"#0a0b{16 + number % _COLOURS:02x}"


def short(name: str) -> str:
    """A name that fits beside a figure, in letters that its font has."""
    plain = " ".join(name.encode("ascii", "replace").decode().split())
    return plain if len(plain) <= 18 else f"{plain[:17]}~"


def inline(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element: its own ids, no link to anywhere, sized by the page."""
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    title = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    opening = f'<svg {view.group() if view else ""} role="img" aria-label="{title}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r' font-family: [^;"]*;', "", svg)
    svg = re.sub(r'fill="(#0a0b\w\w)"', r'style="fill: \1"', svg)
    return re.sub(r"#0a0b(\w\w)", _variable, svg)


def _variable(match: re.Match[str]) -> str:
    if match.group() in _VARIABLES:
        return f"var({_VARIABLES[match.group()]})"
    return f"var(--plot-{int(match.group(1), 16) - 16})"
