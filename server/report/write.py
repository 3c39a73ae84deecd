"""A run's folder as one page: ``fedspan report NAME`` writes runs/NAME/report.html, ``fedspan watch`` shows it live.

The report depends on the folder alone, so it can be written again at any time, also for a run that failed or has not
ended. The same folder gives the same bytes.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from common.errors import RunFolderError
from common.metrics import ANSWERS, SCORES
from common.system.files import write_atomically
from common.web.template import Page, Section, fill
from server.report import words
from server.report.diagnostics import shaded
from server.report.figures import Figure, figures
from server.run import records
from server.run.ages import ages
from server.run.read import Run, read_all
from server.run.state import RunState, state_of

_HERE = Path(__file__).parent
_MOST_PROBLEMS = 200  # the last so many are shown


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Raises:
        RunFolderError: the folder holds no run, a file of it cannot be read, or the report cannot be written.
    """
    run = read_all(run_dir)
    if not run.info:
        raise RunFolderError(f"{run_dir} is no run folder: it holds no run.json")
    file = run_dir / "report.html"
    try:
        write_atomically(file, render(run))
    except OSError as error:
        raise RunFolderError(f"{file} cannot be written: {error.strerror or error}") from None
    return file


def render(run: Run) -> str:
    """The report of a run, as of its last event."""
    state = state_of(run, run.newest)
    return Page(f"{run.name}: federation report", head(run, state), sections(run, figures(run))).html()


def head(run: Run, state: RunState, *, live: bool = False) -> Markup:
    """The part above all sections: name, state, result, first facts.

    Args:
        run: the run.
        state: its state.
        live: the page is brought up to date, so it need not say of when it is.
    """
    results = records.results(run.metrics)
    return fill(
        _HERE / "head.html",
        name=run.name,
        state=state.state,
        live=live,
        reason=words.without_paths(state.reason or ""),
        done=run.done,
        planned=run.planned,
        newest=run.newest,
        headline=words.headline(run, results) if results or not live else [],
        facts=words.first_facts(run, state, live=state.state in ("starting", "running") and live),
    )


def sections(run: Run, drawn: Mapping[str, list[Figure]]) -> list[Section]:
    """All sections about what has happened; ``drawn``: their figures."""
    found = []
    for name, short, title, values in SECTIONS:
        told = values(run)
        if told is not None:
            html = fill(_HERE / f"{name}.html", figures=drawn.get(name, []), **told)
            found.append(Section(name, short, title, html))
    return found


def _result(run: Run) -> dict[str, Any]:
    results = records.results(run.metrics)
    shown = records.shown_scores(results)
    return {
        "results": results,
        "delta": words.delta,
        "scores": shown,
        "of_answers": [s.title for s in shown if s.of == ANSWERS],
        "fewest_answers": min((line.generated for line in results if line.generated), default=0),
        "confusion": records.confusion(run.metrics, list((run.config.get("task") or {}).get("labels", []))),
        "any_trained": any(line.version for line in results),
        "newest_version": max((line.version for line in results), default=0),
    }


def _curves(run: Run) -> dict[str, Any]:
    shown = records.shown_scores(records.results(run.metrics))
    lines = [(score, records.curve(run.metrics, score.name)) for score in shown]
    return {"curve_tables": [(s, by, sorted({v for line in by.values() for v in line})) for s, by in lines]}


def _costs(run: Run) -> dict[str, Any]:
    return {
        "sent": words.sent(run),
        "costs": records.costs(run.metrics),
        "phases": [phase for phase in records.PHASES if phase != "aggregate"],
        "trainings": records.trainings(run.metrics),
    }


def _answers(run: Run) -> dict[str, Any]:
    return {"samples": run.samples, "ended": run.info.get("status") == "completed"}


def _drift(run: Run) -> dict[str, Any] | None:
    tables = [shaded(table) for table in records.diagnostics(run.metrics)]
    return {"diagnostics": tables} if tables else None


def _sites(run: Run) -> dict[str, Any]:
    rounds = records.rounds_begun(run.events)
    sites = records.sites(run.events, rounds, buffered=run.buffered)
    return {"rounds": rounds, "sites": sites, "noise": words.noise(run), "ages": _ages(run) if run.buffered else None}


def _ages(run: Run) -> dict[str, Any]:
    """Numbers of updates by site and age, and of those that were dropped."""
    dropped = Counter(event["client"] for event in run.events if event["event"] == "update_dropped")
    names = records.order({record["client"] for record in run.metrics if record["phase"] == "train"} | dropped.keys())
    columns = range(max(ages(run.metrics), default=0) + 1)
    counted = {who: ages(run.metrics, who) for who in names}
    sites = {who: [counted[who].get(age, 0) for age in columns] for who in names}
    return {"columns": columns, "sites": sites, "dropped": dropped}


def _model(run: Run) -> dict[str, Any] | None:
    best, models = run.info.get("best"), run.info.get("models", {})
    sites = words.delivered(run)
    if not (best or models or sites):
        return None
    return {
        "best": best,
        "metric": SCORES[best["metric"]].in_text if best and best["metric"] in SCORES else "",
        "models": models,
        "sites": sites,
        "stopped": run.info.get("stopped_early"),
        "ended": run.info.get("status") == "completed",
    }


def _problems(run: Run) -> dict[str, Any]:
    found = records.problems(run.events)
    return {"problems": found[-_MOST_PROBLEMS:], "count": len(found), "shown": words.without_paths}


def _security(run: Run) -> dict[str, Any]:
    return {"facts": words.security(run), "keys": words.keys(run)}


def _settings(run: Run) -> dict[str, Any]:
    return {"versions": words.versions(run), "settings": words.settings(run), "trained": run.info.get("trained", {})}


#: The sections: anchor and template's name, title in the list, heading, and the values for the template, None for no
#: section. A new section is a line here and a template.
SECTIONS: list[tuple[str, str, str, Callable[[Run], dict[str, Any] | None]]] = [
    ("result", "Result", "Result: base model and federation", _result),
    ("curves", "Round by round", "Round by round", _curves),
    ("costs", "Time and bytes", "Time and bytes", _costs),
    ("answers", "Answers", "The same questions, before and after", _answers),
    ("drift", "Updates", "What the updates looked like", _drift),
    ("model", "Model", "The model, and who has it", _model),
    ("sites", "Sites", "Sites and rounds", _sites),
    ("problems", "Problems", "Refusals and failures", _problems),
    ("security", "Security", "Security", _security),
    ("settings", "Settings", "Settings and versions", _settings),
]
