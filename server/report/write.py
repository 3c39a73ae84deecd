"""A run folder as one self-contained page: ``fedspan report NAME`` writes runs/NAME/report.html.

The report depends on the folder alone, so it can be written again at any time, also for a run that failed or has not
ended. The same folder gives the same bytes.
"""

from pathlib import Path

from common.errors import RunFolderError
from common.metrics import ANSWERS
from common.system.files import write_atomically
from server.report import words
from server.report.diagnostics import shaded
from server.report.figures import figures
from server.report.read import Run, read_run
from server.report.template import fill
from server.run import records

_PAGE = Path(__file__).with_name("page.html")


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


def render(run: Run) -> str:
    """The page of a run."""
    results = records.results(run.metrics)
    tables = [shaded(table) for table in records.diagnostics(run.metrics)]
    answers = [line.generated for line in results if line.generated]
    shown = records.shown_scores(results)
    curves = [(s, records.curve(run.metrics, s.name)) for s in shown]
    contents = [("result", "Result"), ("curves", "Round by round"), ("costs", "Time and bytes"), ("answers", "Answers")]
    contents += [("drift", "Updates")] if tables else []
    contents += [("sites", "Sites"), ("settings", "Settings and versions")]
    return fill(
        _PAGE,
        name=run.info.get("name", ""),
        status=run.info["status"],
        reason=run.info.get("reason"),
        done=run.done,
        planned=run.planned,
        newest=run.newest,
        headline=words.headline(run, results),
        facts=words.first_facts(run),
        contents=contents,
        results=results,
        scores=shown,
        of_answers=[s.title for s in shown if s.of == ANSWERS],
        confusion=records.confusion(run.metrics, list((run.config.get("task") or {}).get("labels", []))),
        any_trained=any(line.version for line in results),
        newest_version=max((line.version for line in results), default=0),
        fewest_answers=min(answers, default=0),
        curve_tables=[(s, lines, sorted({v for line in lines.values() for v in line})) for s, lines in curves],
        figures=figures(run),
        sent=words.sent(run),
        costs=records.costs(run.metrics),
        phases=[phase for phase in records.PHASES if phase != "aggregate"],
        trainings=records.trainings(run.metrics),
        samples=run.samples,
        diagnostics=tables,
        rounds=records.rounds_begun(run.events),
        sites=records.sites(run.events, records.rounds_begun(run.events)),
        noise=words.noise(run),
        problems=records.problems(run.events),
        versions=words.versions(run),
        digests=words.digests(run),
        settings=run.settings,
        trained=run.info.get("trained", {}),
    )
