"""The comparison's figures, in the report's manner: lines differ in dash and marker, so none needs colour."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from common import text as units
from deploy.data.partition_picture import draw
from deploy.experiment.compare_data import BYTES, SECONDS, Estimate, Line
from deploy.experiment.summary import ToldPartition
from server.report.plots import DASHES, INK, MARKERS, STYLE, colour, inline, short

_COLOURS = (2, 3, 4, 7, 6, 0)  # those of the report's colours that are dark enough for a thin line


def curves(lines: Sequence[tuple[str, Line]], key: str, *, name: str, axis: str, label: str) -> str:
    """A score against rounds, bytes and seconds; a line and a band of one deviation for every strategy.

    Args:
        lines: pairs (title of the strategy, line).
        key: the score's key.
        name: the figure's name, unique on the page.
        axis: label of the y axis.
        label: the figure in words.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.2), layout="constrained")
        rounds, moved, spent = figure.subplots(1, 3, sharey=True)
        for number, (title, line) in enumerate(lines):
            curve = line.curve(key)
            _band(rounds, {float(v): e for v, e in curve.items()}, number, title)
            total, since = line.cost(BYTES), line.cost(SECONDS)
            _band(moved, {total[v]: e for v, e in curve.items() if total.get(v)}, number, None)
            _band(spent, {since[v]: e for v, e in curve.items() if v in since}, number, None)
        rounds.set_ylabel(axis)
        rounds.set_xlabel("rounds")
        rounds.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        moved.set_xlabel("tensors moved, up and down, all sites (log scale)")
        if moved.lines:
            moved.set_xscale("log")
            places = [float(x) for drawn in moved.lines for x in drawn.get_xdata()]
            wide = max(places, default=1.0) > 10 * min(places, default=1.0)
            moved.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6) if wide else MaxNLocator(4))
            moved.xaxis.set_minor_formatter(NullFormatter())
            moved.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.size(value)))
        spent.set_xlabel("seconds, all sites at once, without transport")
        for axes in (rounds, moved, spent):
            _plain(axes)
        handles, labels = rounds.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(6, len(labels)), handlelength=3.2)
        return inline(figure, name, label)


def over_rounds(panels: Mapping[str, Sequence[tuple[str, Mapping[int, Estimate]]]], *, name: str, label: str) -> str:
    """One small figure per diagnostic, with a line for every strategy that reports it.

    Args:
        panels: by title, each strategy's values; a strategy has the same place in every panel.
        name: unique on the page.
        label: the figure in words.
    """
    with mpl.rc_context(STYLE):
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(3.5 * columns, 0.5 + 2.6 * rows), layout="constrained")
        found: dict[str, Artist] = {}
        for place, (title, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            for number, (strategy, values) in enumerate(lines):
                if values:
                    _band(axes, {float(n): e for n, e in values.items()}, number, strategy)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
            _plain(axes)
            handles, labels = axes.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
        figure.legend(found.values(), found, loc="outside upper left", ncols=min(6, len(found)), handlelength=3.2)
        return inline(figure, name, label)


def gains(claims: Mapping[str, Sequence[tuple[str, str, float, float]]], *, name: str, axis: str, label: str) -> str:
    """How much better each claim's strategy is: means and intervals, a row for every setting and other strategy.

    Args:
        claims: by title, its rows (setting, other strategy, mean gain, half the width of its interval).
        name: the figure's name, unique on the page.
        axis: label of the x axis.
        label: the figure in words.
    """
    with mpl.rc_context(STYLE):
        heights = [len(rows) + len({setting for setting, *_ in rows}) for rows in claims.values()]
        figure = Figure(figsize=(7.4, 0.7 + 0.21 * sum(heights) + 0.35 * len(heights)), layout="constrained")
        panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, rows) in zip(panels, claims.items(), strict=True):
            texts, heads = list[str](), list[int]()
            for setting, members in itertools.groupby(rows, key=lambda row: row[0]):
                heads.append(len(texts))
                texts.append(setting)
                for _, other, gain, margin in members:
                    decided = abs(gain) > margin
                    axes.errorbar(
                        gain,
                        len(texts),
                        xerr=margin,
                        fmt="o",
                        color=_colour(0 if gain > 0 else 1) if decided else INK,
                        markerfacecolor=None if decided else "none",
                        markersize=5,
                        linewidth=1.2,
                    )
                    texts.append(f"than {other}")
            ticks = axes.set_yticks(range(len(texts)), texts)
            for head in heads:
                ticks[head].label1.set_fontstyle("italic")
            axes.set_ylim(len(texts) - 0.4, -0.6)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_title(title, fontsize=9, loc="left", weight="bold")
            _plain(axes, grid="x")
        panels[-1].set_xlabel(axis)
        return inline(figure, name, label)


def partition(held: ToldPartition, *, name: str, label: str) -> str:
    """Sites against labels; a dot's area is a site's number of rows with the label."""
    with mpl.rc_context(STYLE):
        return inline(draw(held.sites, ink=INK, name=short), name, label)


def _band(axes: Axes, values: Mapping[float, Estimate], number: int, title: str | None) -> None:
    """A strategy's line and its band."""
    places, means = list(values), [estimate.mean for estimate in values.values()]
    axes.plot(
        places,
        means,
        color=_colour(number),
        linestyle=("-", *DASHES)[number % (len(DASHES) + 1)],
        linewidth=1.4,
        marker=("o" + MARKERS)[number % (len(MARKERS) + 1)],
        markersize=3.5,
        markevery=max(1, len(places) // 8),
        label=title,
    )
    spread = [estimate.deviation or 0.0 for estimate in values.values()]
    if any(spread):
        low, high = ([m + sign * d for m, d in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=_colour(number), alpha=0.15, linewidth=0)


def _colour(number: int) -> str:
    return colour(_COLOURS[number % len(_COLOURS)])


def alone(svg: str) -> str:
    """A figure of the page as a file of its own, in the page's light colours on white."""
    head, rest = svg.split(">", 1)
    head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    light = resources.files("common.web").joinpath("style.css").read_text(encoding="utf-8").split("}", 1)[0]
    colours = re.findall(r"--(?:plot-\w+|paper): #\w+;", light)
    style = f"svg {{ {' '.join(colours)} font-family: sans-serif; background: var(--paper); }}"
    return f"{head}><style>{style}</style>{rest}\n"


def _plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    axes.grid(axis=grid, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
