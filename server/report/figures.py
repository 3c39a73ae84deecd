"""The report's figures, by section, each with a description in words."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from markupsafe import Markup

from common.web.format import score
from server.report import plots
from server.run import records
from server.run.read import Run

_MOST_BARS = 40  # more bars than that are shown as one mean bar per site
_MOST_WORDS = 40  # bars that are told in words
_MOST_LINES = 10  # likewise lines


@dataclass(frozen=True)
class Figure:
    """A drawing and the words below it."""

    svg: Markup
    caption: str


def scores_by_round(run: Run) -> Iterator[Figure]:
    """One figure per score that is drawn."""
    for how in records.shown_scores(records.results(run.metrics)):
        lines = records.curve(run.metrics, how.name)
        if how.curve and lines:
            ends = [f"{w} {score(v[min(v)])} to {score(v[max(v)])}" for w, v in list(lines.items())[:_MOST_LINES]]
            label = f"{how.title} by round. {'; '.join(ends)}."
            zero = not how.lower_is_better
            svg = plots.curves(lines, name=how.name, axis=f"held-out {how.title}", label=label, from_zero=zero)
            better = "Lower" if how.lower_is_better else "Higher"
            scale = "" if zero else " The axis does not start at zero."
            beyond = plots.dwarfing(lines)
            cut = f" Above the axis, and not drawn: values of {', '.join(beyond[:_MOST_LINES])}." if beyond else ""
            yield Figure(Markup(svg), f"{how.title} on held-out rows. {better} is better.{scale}{cut}")  # noqa: S704


def time_by_phase(run: Run) -> Iterator[Figure]:
    """The rounds' seconds by phase; for many rounds and sites a mean round."""
    bars, caption = records.bars(run.metrics), "Where each round's time went, for every site and the server."
    if len(bars) > _MOST_BARS:
        bars = records.mean_bars(bars)
        caption = "Where a round's time went: the mean over all rounds, for every site and the server."
    told = [f"{f'round {b.round}, ' if b.round else ''}{b.who}: {sum(b.seconds.values()):.0f} s" for b in bars]
    if bars:
        label = f"Seconds by phase. {'; '.join(told[:_MOST_WORDS])}."
        yield Figure(Markup(plots.time_bars(bars, name="time", label=label)), caption)  # noqa: S704 - drawn here


#: Functions that draw a section's figures of a run's metrics, by the id of the section's heading. A new plot is a line
#: here.
FIGURES: dict[str, list[Callable[[Run], Iterable[Figure]]]] = {"curves": [scores_by_round], "costs": [time_by_phase]}


def figures(run: Run) -> dict[str, list[Figure]]:
    """All figures of a run by section."""
    return {section: [figure for draw in draws for figure in draw(run)] for section, draws in FIGURES.items()}
