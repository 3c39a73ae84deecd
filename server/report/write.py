"""A run folder as one self-contained page: ``python -m server.report.write runs/NAME`` writes runs/NAME/report.html.

Made from the folder alone, so it can be made again at any time, also of a run that failed or has not ended. The same
folder gives the same bytes.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from common.config.strategy import title_of
from common.errors import FedSpanError, RunFolderError
from common.metrics import ANSWERS, SCORES, Score
from common.system.files import write_atomically
from common.text import clock
from server.report import plots
from server.report.format import delta, precise, score, seconds, size, utc, whole
from server.report.page import PAGE, STYLE
from server.run import records as facts
from server.run.folder import read_lines

MEANINGS = {
    "client-cosine": (
        "Agreement of the sites",
        "mean cosine between two sites' updates; 1: the same direction, 0: unrelated, below 0: against each other",
    ),
    "wire-error": (
        "What rounding on the wire did",
        "relative error of each site's update, and of the mean that went down, in the federation's wire_precision",
    ),
    "client-norm": ("Size of the sites' updates", "mean L2 norm of a site's change of what it trains"),
    "truncation-loss": (
        "Truncation loss",
        "share of the averaged product's energy that the federation's rank leaves out",
    ),
    "numerical-rank": ("Numerical rank", "of the averaged product: singular values above a millionth of the largest"),
    "stable-rank": ("Stable rank", "of the averaged product: its energy over that of its largest singular value"),
    "aggregation-error": (
        "Aggregation error",
        "distance of the product of averages from the average of products, relative; 0: exact",
    ),
    "residual": (
        "Residual",
        "what the averages of A and B lose and the base weights take, relative to the average of products",
    ),
    "clip-factor": ("Norm clipping", "what a site's change was multiplied by; 1: not clipped"),
    "clipped": ("Sites clipped", "sites whose change was longer than clip_norm medians"),
    "krum-selected": ("Krum's choice", "1: the site's update was taken, 0: it was left out"),
    "trimmed": ("Values trimmed", "updates left out at either end of every coordinate"),
}
_MOST_BARS = 40  # more bars than that are shown as one mean bar per site
_MOST_COLUMNS = 10  # rounds shown of a diagnostic
_DARKEST = 35  # per cent of --shade in the cell with the largest number


@dataclass(frozen=True)
class Run:
    """All that was read from a run folder."""

    info: dict[str, Any]
    events: list[facts.Record]
    metrics: list[facts.Record]
    samples: list[dict[str, str]]
    settings: str

    @property
    def done(self) -> int:
        """Rounds that were finished."""
        return max((event["round"] for event in self.events if event["event"] == "round_finished"), default=0)

    @property
    def newest(self) -> float:
        """Unix time of the last event, or of the start."""
        return float(self.events[-1]["time"] if self.events else self.info["started"])

    def event(self, kind: str) -> facts.Record:
        """The last event of a kind; empty when there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Raises:
        RunFolderError: the folder holds no run, a file of it cannot be read, or the report cannot be written.
    """
    page = render(read_run(run_dir))
    file = run_dir / "report.html"
    try:
        write_atomically(file, page)
    except OSError as error:
        raise RunFolderError(f"{file} cannot be written: {error.strerror or error}") from None
    return file


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        RunFolderError: the folder holds no run, or a file of it cannot be read.
    """
    if not (run_dir / "run.json").is_file():
        raise RunFolderError(f"{run_dir} is no run folder: it holds no run.json")
    try:
        samples = run_dir / "samples.json"
        settings = run_dir / "federation.yaml"
        return Run(
            info=_json(run_dir / "run.json"),
            events=read_lines(run_dir / "events.jsonl"),
            metrics=read_lines(run_dir / "metrics.jsonl"),
            samples=_json(samples) if samples.exists() else [],
            settings=settings.read_text(encoding="utf-8") if settings.exists() else "",
        )
    except OSError as error:
        raise RunFolderError(f"{error.filename} cannot be read: {error.strerror}") from None


def render(run: Run) -> str:
    """The page of a run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (score, precise, whole, seconds, size, utc, delta)}
    results = facts.results(run.metrics)
    tables = [_shaded(table) for table in facts.diagnostics(run.metrics)]
    answers = [line.generated for line in results if line.generated]
    shown = facts.shown_scores(results)
    curves = [(s, facts.curve(run.metrics, s.name)) for s in shown]
    contents = [("result", "Result"), ("curves", "Round by round"), ("costs", "Time and bytes"), ("answers", "Answers")]
    contents += [("drift", "Updates")] if tables else []
    contents += [("sites", "Sites"), ("settings", "Settings and versions")]
    return environment.from_string(PAGE).render(
        style=Markup(STYLE),  # noqa: S704 - a constant
        name=run.info.get("name", ""),
        status=run.info["status"],
        reason=run.info.get("reason"),
        done=run.done,
        planned=_planned(run),
        newest=run.newest,
        headline=headline(run, results),
        facts=_facts(run),
        contents=contents,
        results=results,
        scores=shown,
        of_answers=[s.title for s in shown if s.of == ANSWERS],
        confusion=facts.confusion(run.metrics, _labels(run)),
        any_trained=any(line.version for line in results),
        newest_version=max((line.version for line in results), default=0),
        fewest_answers=min(answers, default=0),
        curve_tables=[(s, lines, sorted({v for line in lines.values() for v in line})) for s, lines in curves],
        figures={"curves": _curve_figures(curves), "time": _time_figure(run)},
        time_caption=_time_caption(run),
        sent=_sent(run),
        costs=facts.costs(run.metrics),
        phases=[phase for phase in facts.PHASES if phase != "aggregate"],
        trainings=facts.trainings(run.metrics),
        samples=run.samples,
        diagnostics=tables,
        rounds=facts.rounds_begun(run.events),
        sites=facts.sites(run.events, facts.rounds_begun(run.events)),
        problems=facts.problems(run.events),
        versions=_versions(run),
        digests=_digests(run),
        settings=run.settings,
        trained=run.info.get("trained", {}),
    )


def headline(run: Run, results: list[facts.Result]) -> list[str]:
    """The result in one to three sentences, as plain when it is bad as when it is good."""
    judged = [line for line in results if line.version]
    if not judged:
        return ["No trained model was evaluated, so there is no result to compare."]
    sentences = []
    for line in judged:
        if line.who == facts.SERVER:
            parts = [
                f"{how.in_text} went from {score(change.before)} to {score(change.after)} ({_WORDS[change.verdict]})"
                for how in SCORES.values()
                if how.headline and (change := line.changes.get(how.name)) is not None
            ]
            after = f"After {line.version} round{'s' if line.version > 1 else ''} of {_strategy(run)}"
            sentences.append(f"{after}, on the server's own set, {' and '.join(parts)}.")
    sites = [line for line in judged if line.who != facts.SERVER and "loss" in line.changes]
    if sites:
        count = {v: [s.who for s in sites if s.changes["loss"].verdict == v] for v in ("better", "worse", "same")}
        worse = f", worse at {len(count['worse'])} ({', '.join(count['worse'][:5])})" if count["worse"] else ""
        same = f", unchanged at {len(count['same'])}" if count["same"] else ""
        sentences.append(
            f"At the sites, held-out loss is better at {len(count['better'])} of {len(sites)}{worse}{same}."
        )
    return sentences


_WORDS = {"better": "better", "worse": "worse", "same": "unchanged", "unknown": "not comparable"}


def _curve_figures(curves: list[tuple[Score, dict[str, dict[int, float]]]]) -> list[tuple[Markup, str]]:
    """One figure per score that is drawn."""
    drawn = []
    for how, lines in curves:
        if how.curve and lines:
            ends = [f"{w} {score(v[min(v)])} to {score(v[max(v)])}" for w, v in list(lines.items())[:10]]
            label = f"{how.title} by round. {'; '.join(ends)}."
            zero = not how.lower_is_better
            svg = plots.curves(lines, name=how.name, axis=f"held-out {how.title}", label=label, from_zero=zero)
            better = "Lower" if how.lower_is_better else "Higher"
            scale = "" if zero else " The axis does not start at zero."
            drawn.append((Markup(svg), f"{how.title} on held-out rows. {better} is better.{scale}"))  # noqa: S704
    return drawn


def _labels(run: Run) -> list[str]:
    """Of a classification."""
    return list(((yaml.safe_load(run.settings) or {}).get("task") or {}).get("labels", []))


def _time_bars(run: Run) -> list[facts.Bar]:
    bars = facts.bars(run.metrics)
    return bars if len(bars) <= _MOST_BARS else facts.mean_bars(bars)


def _time_figure(run: Run) -> Markup:
    bars = _time_bars(run)
    ends = [f"{f'round {b.round}, ' if b.round else ''}{b.who}: {sum(b.seconds.values()):.0f} s" for b in bars[:40]]
    svg = plots.time_bars(bars, name="time", label=f"Seconds by phase. {'; '.join(ends)}.") if bars else ""
    return Markup(svg)  # noqa: S704 - drawn here


def _time_caption(run: Run) -> str:
    bars = facts.bars(run.metrics)
    if len(bars) > _MOST_BARS:
        return "Where a round's time went: the mean over all rounds, for every site and the server."
    return "Where each round's time went, for every site and the server."


def _shaded(table: facts.Diagnostic) -> dict[str, Any]:
    """A diagnostic as a table: per layer group (value, shade in per cent)."""
    title, meaning = MEANINGS.get(table.name, (table.name.replace("-", " ").capitalize(), ""))
    rounds = facts.some(table.rounds, _MOST_COLUMNS)
    values = [v for cells in table.groups.values() for v in cells.values() if v is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def shade(value: float | None) -> int:
        return round(_DARKEST * (value - low) / (high - low)) if value is not None and high > low else 0

    lines = [(g, [(cells.get(n), shade(cells.get(n))) for n in rounds]) for g, cells in table.groups.items()]
    return {"title": title, "meaning": meaning, "rounds": rounds, "lines": lines}


def _facts(run: Run) -> list[tuple[str, str]]:
    """What is said first about a run."""
    settings = yaml.safe_load(run.settings) or {}
    model = settings.get("model", {})
    revision = f" at {model['revision'][:12]}" if model.get("revision") else ""
    lasted = run.info.get("seconds") or run.newest - run.info["started"]
    costs = facts.costs(run.metrics)
    moved = f"{size(sum(c.down for c in costs))} down, {size(sum(c.up for c in costs))} up" if costs else "none"
    return [
        ("Status", str(run.info["status"])),
        ("Strategy", _strategy(run)),
        ("Base model", Path(model["path"]).name if model.get("path") else f"{model.get('hub', '–')}{revision}"),
        ("Rounds", f"{run.done} of {_planned(run)}"),
        ("Sites that trained", str(len(costs))),
        ("Started", utc(run.info["started"])),
        ("Duration", clock(lasted)),
        ("Tensors moved", moved),
    ]


def _sent(run: Run) -> str:
    """What share of the model travels."""
    started = run.event("started")
    if not started.get("model_parameters"):
        return ""
    tensors, trained, all_ = (started[k] for k in ("trained_tensors", "trained_parameters", "model_parameters"))
    return (
        f"Only what is trained travels: {tensors} tensors, {trained:,} of the model's {all_:,} parameters "
        f"({trained / all_:.1%})."
    )


def _planned(run: Run) -> object:
    return run.event("started").get("rounds") or (yaml.safe_load(run.settings) or {}).get("rounds", "–")


def _strategy(run: Run) -> str:
    settings = yaml.safe_load(run.settings) or {}
    return title_of(str((settings.get("strategy") or {}).get("name", "–")))


def _versions(run: Run) -> list[tuple[str, str]]:
    machine = run.info.get("machine", {})
    lines = [(key, str(value)) for key, value in run.info.get("versions", {}).items()]
    cores, memory = machine.get("cores"), machine.get("memory_gib")
    lines += [("machine", f"{machine['cpu']}, {cores} cores, {memory} GiB")] if "cpu" in machine else []
    lines += [("system", str(machine["system"]))] if "system" in machine else []
    lines += [("GPU", ", ".join(machine["gpus"]) or "none")] if "gpus" in machine else []
    return lines


def _digests(run: Run) -> list[tuple[str, str]]:
    keys = {"base_digest": "base model", "tokenizer_digest": "tokenizer", "federation_digest": "federation file"}
    return [(title, str(run.info[key])) for key, title in keys.items() if key in run.info]


def _json(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        raise RunFolderError(f"{file}: not valid JSON") from None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m server.report.write", description="Write a run's report.html.")
    parser.add_argument("run", type=Path, metavar="runs/NAME")
    try:
        print(write_report(parser.parse_args(arguments).run))  # noqa: T201
    except FedSpanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
