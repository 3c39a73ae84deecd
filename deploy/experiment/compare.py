"""An experiment's folder as page and tables: ``fedspan compare DIR``.

    comparison.html         one self-contained page
    comparison.md           the final tables
    comparison.csv          the final numbers, one per line
    comparison-rounds.csv   every number of every seed and round
    comparison-claims.csv   every claim in every setting, where there are claims
    comparison-claims.svg   the same as a picture, where two seeds or more have run

The comparison depends on the folder alone, so it can be repeated at any time; unfinished trials are left out. The same
folder gives the same bytes.
"""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from common import text as units
from common.config.strategy import title_of
from common.errors import RunFolderError
from common.metrics import SCORES
from common.system.files import write_atomically
from common.web.format import precise, score, seconds
from common.web.template import fill
from deploy.experiment import compare_plots as plots
from deploy.experiment.compare_claims import claims, tested
from deploy.experiment.compare_data import BYTES, SECONDS, Comparison, Estimate, Group, Line, read_comparison
from deploy.experiment.compare_text import headline, notes, unscored
from deploy.experiment.summary import ToldPartition
from server.report.diagnostics import MEANINGS

_PAGE = Path(__file__).with_name("compare.html")
_SETTING = ("clients", "alpha", "rank", "local_steps")
_DRAWN = (
    "client-cosine",
    "client-norm",
    "numerical-rank",
    "stable-rank",
    "truncation-loss",
    "aggregation-error",
    "waiting",
)


def write_comparison(out: Path) -> Path:
    """Write the comparison into an experiment's folder; return the page's path.

    Raises:
        RunFolderError: the folder holds no experiment, or a file cannot be read or written.
    """
    found = read_comparison(out)
    drawn = _claims_figure(found)
    files = {
        "comparison.html": render(found, drawn),
        "comparison.md": markdown(found),
        "comparison.csv": _csv(
            ("strategy", *_SETTING, "learning_rate", "measure", "mean", "deviation", "seeds", "rates_without_score"),
            _final(found),
        ),
        "comparison-rounds.csv": _csv(("strategy", *_SETTING, "seed", "round", "measure", "value"), _rounds(found)),
    }
    if found.claims:
        told = ("gain", "deviation", "seeds", "p", "verdict", "seeds_needed", "plateau")
        head = ("strategy", *_SETTING, "than", "measure", *told)
        files["comparison-claims.csv"] = _csv(head, _claims(found))
    if drawn:
        files["comparison-claims.svg"] = plots.alone(drawn)
    for name in ("comparison-claims.csv", "comparison-claims.svg"):  # an earlier call may have written them
        if name not in files:
            (out / name).unlink(missing_ok=True)
    for name, text in files.items():
        try:
            write_atomically(out / name, text)
        except OSError as error:
            raise RunFolderError(f"{out / name} cannot be written: {error.strerror or error}") from None
    return out / "comparison.html"


def markdown(found: Comparison) -> str:
    """The final tables of every setting: at equal rounds, and at equal bytes."""
    parts = [f"# {found.name}", *(line for note in notes(found) for line in ("", note))]
    for title, heads, rows in (*claims(found), *(table for group in found.groups for table in _tables(group))):
        parts += ["", f"**{title}**", "", _cells(heads), _cells(["---", *["---:"] * (len(heads) - 1)])]
        parts += [_cells([f"**{text}**" if best else text for text, best in row]) for row in rows]
    return "\n".join(parts) + "\n"


def render(found: Comparison, drawn: str) -> str:
    """The page; ``drawn``: the claims as a picture."""
    groups = [_shown(group, number) for number, group in enumerate(found.groups)]
    partitions = [
        (_partition_title(held), _partition_figure(held, number), held) for number, held in enumerate(found.partitions)
    ]
    samples_title, samples = _samples(found.groups)
    diagnostics = {name for group in found.groups for name in _diagnostics(group)}
    contents = [("claims", "Claims")] if found.claims else []
    contents += [("result", "Result"), ("curves", "Round by round")]
    contents += [("updates", "Updates")] if diagnostics else []
    contents += [("partitions", "Who holds what")] if partitions else []
    contents += [("answers", "Answers")] if samples else []
    lines = [line for group in found.groups for line in group.lines]
    return fill(
        _PAGE,
        title=f"{found.name}: comparison of strategies",
        live=False,
        name=found.name,
        missing=sum(line.missing for line in lines),
        wanted=sum(line.missing + len(line.seeds) for line in lines),
        headline=headline(found),
        notes=notes(found),
        contents=contents,
        claims=list(claims(found)),
        claims_figure=Markup(drawn),  # noqa: S704 - drawn here
        groups=groups,
        scores=[s for s in SCORES.values() if any(s in group.scores() for group in found.groups)],
        any_diagnostics=bool(diagnostics),
        meanings=[MEANINGS[name] for name in _DRAWN if name in diagnostics],
        partitions=partitions,
        samples_title=samples_title,
        samples=samples,
    )


def _shown(group: Group, number: int) -> dict[str, Any]:
    """A setting as the page shows it."""
    lines = [(title_of(line.strategy), line) for line in group.lines if line.seeds]
    curves = []
    for how in [s for s in group.scores() if s.curve]:
        ends = "; ".join(f"{title} {_estimate(line.final(how.name))}" for title, line in lines)
        svg = plots.curves(
            lines,
            how.name,
            name=f"{how.name}-{number}",
            axis=how.title,
            label=f"{how.title}, {group.title}. {ends}.",
        )
        better = "Lower" if how.lower_is_better else "Higher"
        curves.append((Markup(svg), f"{how.title}. {better} is better; the axis need not start at zero."))  # noqa: S704
    panels = {
        MEANINGS[name][0]: [(title, line.diagnostic(name)) for title, line in lines] for name in _diagnostics(group)
    }
    drawn = ""
    if panels:
        drawn = plots.over_rounds(panels, name=f"updates-{number}", label=f"{', '.join(panels)}; {group.title}.")
    return {
        "title": group.title,
        "tables": list(_tables(group, timed=True)),
        "curves": curves,
        "diagnostics": Markup(drawn),  # noqa: S704 - drawn here
    }


def _tables(group: Group, *, timed: bool = False) -> Iterator[tuple[str, list[str], list[list[tuple[str, bool]]]]]:
    """A setting's tables: title, heads, and rows of texts, the strategy's name first, each with whether it is best."""
    scores = group.scores()
    heads = [f"{s.title} {'↓' if s.lower_is_better else '↑'}" for s in scores]

    def row(line: Line, before: list[str], after: list[str], most: float = math.inf) -> list[tuple[str, bool]]:
        told = [(_estimate(line.final(s.name, most)), line.strategy in group.best(s, most)) for s in scores]
        return [
            (title_of(line.strategy), False),
            *((b, False) for b in before),
            *told,
            *((a, False) for a in after),
        ]

    rows, stopped = [], any(line.until is not None for line in group.lines)
    for line in group.lines:
        moved, spent = line.final(BYTES), line.final(SECONDS)
        rounds = max((line.last(seed) for seed in line.seeds), default=0)
        rate = "–" if line.rate is None else f"{line.rate:g}{'†' if line.edge else ''}"
        after = ["–" if moved is None or not rounds else units.size(moved.mean / rounds / group.clients)]
        after += ["–" if spent is None or not rounds else seconds(spent.mean / rounds)] if timed else []
        before = [rate, f"{rounds}{'‡' if line.unfinished else ''}", str(len(line.seeds))]
        rows.append(row(line, before if stopped else [rate, str(len(line.seeds))], after))
    last = ["Moved per site and round", *(["Seconds per round"] if timed else [])]
    yield group.title, ["Strategy", "Rate", *(["Round"] if stopped else []), "Seeds", *heads, *last], rows

    most, rows = group.thriftiest(), []
    for line in [line for line in group.lines if line.seeds]:
        moved = line.final(BYTES, most)
        after = ["–" if moved is None else units.size(moved.mean / group.clients)]
        rows.append(row(line, [str(max(line.last(seed, most) for seed in line.seeds))], after, most))
    if len(rows) > 1:
        title = f"{group.title}, at equal bytes: at most {units.size(most / group.clients)} per site"
        yield title, ["Strategy", "Rounds", *heads, "Moved per site"], rows


def _diagnostics(group: Group) -> list[str]:
    """The diagnostics that at least one strategy of a setting reports."""
    return [name for name in _DRAWN if any(line.diagnostic(name) for line in group.lines)]


def _claims_figure(found: Comparison) -> str:
    """The claims as a picture; empty where none has been tested with two seeds."""
    told: dict[str, list[tuple[str, str, float, float]]] = {}
    for one in tested(found):
        if one.paired is not None and one.paired.margin is not None:
            than = title_of(one.than) + ("‡" if one.unfinished else "")
            row = (one.group.title, than, one.paired.difference, one.paired.margin)
            told.setdefault(f"{title_of(one.better)} is better", []).append(row)
    if not told:
        return ""
    label = ". ".join(f"{t}: {'; '.join(f'{s}, {o} {g:+.3f} ± {m:.3f}' for s, o, g, m in told[t])}" for t in told)
    axis = f"gain in {SCORES[found.select_by].in_text}: mean and 95 % interval over the seeds"
    return plots.gains(told, name="claims", axis=axis, label=label)


def _partition_title(held: ToldPartition) -> str:
    return Group(held.clients, held.alpha, None, None, []).title


def _partition_figure(held: ToldPartition, number: int) -> Markup:
    rows = [sum(counts.values()) for counts in held.sites.values()]
    label = f"{len(rows)} sites with {min(rows):,} to {max(rows):,} rows, {len(held.labels)} labels."
    return Markup(plots.partition(held, name=f"partition-{number}", label=label))  # noqa: S704 - drawn here


def _samples(groups: list[Group]) -> tuple[str, list[dict[str, Any]]]:
    """Title of the first setting that has answers, and each question with the answers of all strategies."""
    for group in groups:
        answered = [(title_of(line.strategy), line.seeds[0].samples) for line in group.lines if line.seeds]
        answered = [(title, samples) for title, samples in answered if samples]
        if answered:
            questions = []
            for number, first in enumerate(answered[0][1]):
                told = [("Expected", first["expected"]), ("Base model", first["before"])]
                told += [(title, samples[number]["after"]) for title, samples in answered if number < len(samples)]
                questions.append({"prompt": first["prompt"], "expected": first["expected"], "answers": told})
            return group.title, questions
    return "", []


def _final(found: Comparison) -> Iterator[tuple[object, ...]]:
    for group, line in _lines(found):
        without = "; ".join(unscored(line.unscored))
        finals = {key: line.final(key) for key in (*SCORES, BYTES, SECONDS)}
        known = {key: estimate for key, estimate in finals.items() if estimate is not None}
        for key, estimate in known.items():
            yield *_place(group, line), line.rate, key, estimate.mean, estimate.deviation, estimate.seeds, without
        if without and not known:
            yield *_place(group, line), line.rate, None, None, None, 0, without


def _rounds(found: Comparison) -> Iterator[tuple[object, ...]]:
    for group, line in _lines(found):
        for seed in line.seeds:
            measured = {**seed.scores, BYTES: seed.bytes, SECONDS: seed.seconds, **seed.diagnostics}
            for key, values in measured.items():
                for number, value in values.items():
                    yield *_place(group, line), seed.seed, number, key, value


def _claims(found: Comparison) -> Iterator[tuple[object, ...]]:
    for one in tested(found):
        where, paired = (one.group.clients, one.group.alpha, one.group.rank, one.group.local_steps), one.paired
        if paired is not None:
            told = (paired.difference, paired.deviation, paired.seeds, paired.p, paired.verdict, paired.needed())
            yield one.better, *where, one.than, found.select_by, *told, not one.unfinished


def _lines(found: Comparison) -> Iterator[tuple[Group, Line]]:
    yield from ((group, line) for group in found.groups for line in group.lines)


def _place(group: Group, line: Line) -> tuple[object, ...]:
    return line.strategy, group.clients, group.alpha, group.rank, group.local_steps


def _csv(head: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return file.getvalue()


def _cells(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _estimate(value: Estimate | None) -> str:
    """Mean ± deviation as the tables show it."""
    if value is None:
        return "–"
    return score(value.mean) if value.deviation is None else f"{score(value.mean)} ± {precise(value.deviation)}"
