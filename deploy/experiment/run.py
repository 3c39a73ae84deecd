"""Compare strategies: ``fedspan experiment EXPERIMENT.yaml [--scale NAME] [--out DIR] [--on local|ray|slurm]``.

For every setting of the grid (strategy, clients, alpha, rank, local steps) the learning rate is picked on the
validation set; with it, every seed is run and judged on the test set. All runs are federations in one process each
(``deploy.experiment.simulate``) on the round loop, strategies and ClientApp of a real one.

    DIR/experiment.json   the settings with their learning rates and how they were picked, and who holds which labels
    DIR/select/CELL/      a run folder per learning rate, evaluated on the validation set
    DIR/final/CELL/       a run folder per seed, evaluated on the test set
    DIR/comparison.*      see ``fedspan compare``

Called again, it skips cells that have ended well, lets killed ones of the selection go on, and tries failed ones once
more; a learning rate whose training diverges has lost the selection and is not tried again. The comparison of all
finished cells is written also when a cell failed or the experiment was interrupted.
"""

import argparse
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from common.errors import RunFolderError
from common.metrics import SCORES
from common.system.command import FAILED, Command
from common.system.files import hold, write_atomically
from deploy.experiment import trial as cells
from deploy.experiment.config import load_experiment
from deploy.experiment.places.choose import add_places, choose
from deploy.experiment.places.place import Place
from deploy.experiment.places.queue import Queue
from deploy.experiment.plan import Cell, Plan, Setting
from deploy.experiment.summary import SUMMARY


class Experiment:
    """An experiment at work in its folder.

    Args:
        plan: the settings and cells to run.
        out: the experiment's folder.
        place: where the cells run.
        tries: how often a cell whose process died is started again.
        console: the terminal on which progress is shown.
    """

    def __init__(self, plan: Plan, out: Path, place: Place, tries: int, console: Console) -> None:
        self._plan, self._out, self._place = plan, out, place
        self._queue = Queue(plan, out, place, tries, console)
        self._rates: dict[Setting, float | None] = {}

    def run(self) -> None:
        """Run all cells that are not settled yet."""
        plan = self._plan
        self._rates = {s: self._pick(s) if self._is_selected(s) else None for s in plan.settings}
        self._write()  # an interrupt leaves what earlier calls have found
        self._place.check(plan.federation(next(plan.cells())), self._out / SUMMARY)
        self._queue.run("learning rates", [cell for setting in plan.settings for cell in plan.selection(setting)])
        while further := [cell for s in plan.settings if (cell := self._beyond(s)) is not None]:
            for cell in further:
                cells.refuse_changed(self._out / cell.folder, plan.federation(cell), plan.facts(cell))
            self._queue.run("further learning rates", further)
        self._rates = {setting: self._pick(setting) for setting in plan.settings}
        self._write()
        self._queue.run("seeds", self._final())

    def complete(self) -> bool:
        """Whether every setting has the scores of all of its learning rates, and all of its seeds."""
        selected = all(self._is_selected(setting) for setting in self._plan.settings)
        return selected and None not in self._rates.values() and all(map(self._is_settled, self._final()))

    def has_results(self) -> bool:
        """Whether there is something to compare."""
        return any(map(self._is_settled, self._final()))

    def _beyond(self, setting: Setting) -> Cell | None:
        """The next learning rate to try; none when no run had a score and one failed, other than by its rate."""
        best = self._pick(setting)
        return self._plan.beyond(setting, best) if best is not None or self._is_selected(setting) else None

    def _final(self) -> list[Cell]:
        """The cells that judge settings whose learning rate is known."""
        found = ((setting, rate) for setting, rate in self._rates.items() if rate is not None)
        return [cell for setting, rate in found for cell in self._plan.final(setting, rate)]

    def _is_selected(self, setting: Setting) -> bool:
        """Whether every cell that selects the setting's learning rate is settled."""
        return all(map(self._is_settled, self._plan.selection(setting)))

    def _is_settled(self, cell: Cell) -> bool:
        return cells.is_settled(self._out / cell.folder, cell.facts())

    def _pick(self, setting: Setting) -> float | None:
        """The learning rate with the best validation score, the smallest of equals; None: no rate has a score."""
        if not self._plan.selection(setting):
            return self._plan.rates(setting)[0]
        sign = 1 if SCORES[self._plan.config.select_by].lower_is_better else -1
        tried = ((sign * t["score"], t["learning_rate"]) for t in self._tried(setting) if t["score"] is not None)
        return min(tried, default=(0.0, None))[1]

    def _tried(self, setting: Setting) -> list[dict[str, Any]]:
        """Every learning rate with its score on the validation set, or with the cell's status when it has no score."""
        found = list[dict[str, Any]]()
        for cell in self._plan.selection(setting):
            folder = self._out / cell.folder
            status, (at, score) = cells.status(folder), self._scored(folder)
            if score is None and status == "completed":  # the last score was not finite
                status = "diverged"
            found.append({"learning_rate": cell.learning_rate, "score": score, "status": status, "round": at})
        return found

    def _scored(self, folder: Path) -> tuple[int | None, float | None]:
        """The round whose score counts, and its score; None both when the cell did not end with a finite score."""
        key, by_round = self._plan.config.select_by, cells.scores_by_round(folder)
        scored = {number: told[key] for number, told in by_round.items() if key in told}
        last = max(by_round, default=None)
        if last not in scored:
            return None, None
        sign = 1 if SCORES[key].lower_is_better else -1
        best = min(scored, key=lambda number: (sign * scored[number], number))
        number = best if self._plan.config.score_at == "best" else max(scored)
        return number, scored[number]

    def _write(self) -> None:
        settings = []
        for setting, rate in self._rates.items():
            final = [] if rate is None else self._plan.final(setting, rate)
            tried = self._tried(setting)
            at = next((t["round"] for t in tried if t["learning_rate"] == rate), None)
            at = at if self._plan.config.score_at == "best" else None
            about = {**asdict(setting), "learning_rate": rate, "round": at, "tried": tried}
            settings.append({**about, "cells": [cell.folder for cell in final]})
        config = self._plan.config
        summary = {"name": config.name, "select_by": config.select_by, "seeds": config.grid.seeds}
        summary |= {"claims": [claim.model_dump() for claim in config.claims]}
        summary |= {"settings": settings, "partitions": self._plan.partitions}
        write_atomically(self._out / SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep a second experiment out of a folder.

    Raises:
        RunFolderError: there is one already, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = hold(out / ".lock")
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written: {error.strerror or error}") from None
    if lock is None:
        raise RunFolderError(f"{out}: another experiment is at work in this folder")
    try:
        yield
    finally:
        os.close(lock)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _watch_signals() -> None:
    """Let the signals that end a process interrupt it as Ctrl-C does."""
    for one in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(one) != signal.SIG_IGN:  # as nohup has it
            signal.signal(one, _interrupt)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml", help="the experiment file")
    parser.add_argument("--scale", metavar="NAME", help="one of the file's `scales`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/NAME, with a scale runs/NAME-SCALE")
    add_places(parser)


def _run(options: argparse.Namespace) -> int:
    from deploy.experiment.compare import write_comparison  # draws with matplotlib

    console = Console(highlight=False, soft_wrap=True)
    _watch_signals()
    source = options.experiment.resolve()
    plan = Plan(load_experiment(source, options.scale), source)
    name = "-".join(filter(None, (plan.config.name, options.scale)))
    out = (options.out or Path("runs") / name).resolve()
    plan.refuse_changed(out)
    with _alone_in(out):
        place = choose(options, out)
        _watch_signals()  # Ray has set its own way
        experiment = Experiment(plan, out, place, options.tries, console)
        try:
            experiment.run()
        except KeyboardInterrupt:
            if experiment.has_results():
                write_comparison(out)
            raise KeyboardInterrupt("stopped; called again, it goes on") from None
        finally:
            place.close()
        page = write_comparison(out)
    console.print(f"comparison: {page}")
    return 0 if experiment.complete() else FAILED


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="DIR", help="an experiment's folder, such as runs/NAME")


def _compare(options: argparse.Namespace) -> None:
    from deploy.experiment.compare import write_comparison

    print(write_comparison(options.experiment))  # noqa: T201


EXPERIMENT = Command(
    _arguments,
    _run,
    example="benchmarks/experiments/terms.yaml --scale quick --jobs 2",
    then="fedspan compare runs/NAME, to write the comparison anew",
    notes="Called again, it goes on where it was stopped. Exit code 1: a cell failed; the others are compared.",
)
COMPARE = Command(
    _compare_arguments,
    _compare,
    example="runs/terms-quick",
    then="runs/terms-quick/comparison.html, in a browser",
    notes="Writes comparison.html, .md and .csv into the folder, of what is there.",
)
