"""The queue of an experiment's cells: which one is handed over next, and which one is tried again."""

import math
import time
from collections import defaultdict, deque
from pathlib import Path

from rich.console import Console

from common.errors import LaunchError, RunFolderError
from common.system.processes import last_lines
from common.text import clock
from deploy.experiment import trial as cells
from deploy.experiment.places.cluster import RULE
from deploy.experiment.places.place import UNSEEN, End, Place, Trial
from deploy.experiment.plan import Cell, Plan
from server.run.folder import read_run

_LOOK = 5.0  # seconds between two looks at a cell on which an earlier process is at work
_SETTLE = 90.0  # seconds after which a shared file system shows everywhere what one machine has written


class Queue:
    """Hands cells to a place; the arguments are those of ``Experiment``."""

    def __init__(self, plan: Plan, out: Path, place: Place, tries: int, console: Console) -> None:
        self._plan, self._out, self._place, self._console = plan, out, place, console
        self._tries = defaultdict[str, int](lambda: tries)  # by the folder of a cell
        self._running: dict[Path, Cell] = {}
        self._held: set[Path] = set()

    def run(self, what: str, wanted: list[Cell]) -> None:
        """Run the cells that are not settled yet, some at a time.

        Args:
            what: name of these cells, for the terminal.
            wanted: the cells.

        Raises:
            LaunchError: the place cannot run them; see ``Place``.
        """
        waiting = deque(cell for cell in wanted if not self._is_settled(cell))
        total, before, began = len(wanted), len(wanted) - len(waiting), time.monotonic()
        self._console.print(f"{what}: {total} cells, {before} of them done")
        try:
            while waiting or self._running:
                self._start(waiting)
                if waiting and not self._running:  # earlier processes are at work on them
                    time.sleep(_LOOK)
                for trial, end in self._place.ended(_LOOK) if self._running else ():
                    cell = self._running.pop(trial.folder)
                    if self._is_tried_again(cell, end):
                        waiting.append(cell)
                        continue
                    told, left = self._ended(cell, end), len(waiting) + len(self._running)
                    done, spent = total - left, time.monotonic() - began
                    times = [] if end.seconds is None else [clock(end.seconds)]
                    times += [f"about {clock(spent / (done - before) * left)} left"] if left else []
                    self._console.print(f"{done}/{total} {cell.folder}: {told} ({'; '.join(times)})")
        finally:
            self._place.stop()
            self._running.clear()

    def _start(self, waiting: deque[Cell]) -> None:
        """Hand over as many cells as the place takes."""
        for cell in list(waiting):
            if len(self._running) >= self._place.slots:
                return
            folder, federation = self._out / cell.folder, self._plan.federation(cell)
            if self._is_settled(cell):  # by the process of an earlier call
                waiting.remove(cell)
            elif (prepared := cells.prepare(folder, federation, self._plan.facts(cell))) is not None:
                waiting.remove(cell)
                self._place.start(Trial(folder, *prepared, federation))
                self._running[folder] = cell
            elif folder not in self._held:
                self._held.add(folder)
                self._console.print(f"{cell.folder}: an earlier process is at work on it; waiting for its end")

    def _is_tried_again(self, cell: Cell, end: End) -> bool:
        """Whether a cell is to be started again, because its process died.

        Raises:
            LaunchError: its machine does not see the experiment's files.
        """
        if end.code == UNSEEN:
            raise LaunchError(f"{end.said}; {RULE}")
        if not end.died or not self._tries[cell.folder]:
            return False
        self._tries[cell.folder] -= 1
        self._console.print(f"{cell.folder}: {self._death(cell, end)}; started again")
        return True

    def _death(self, cell: Cell, end: End) -> str:
        how = end.said if end.code is None else f"its process ended with {end.code}"
        return f"{how}: {last_lines(self._out / cell.folder / cells.LOG)}"

    def _ended(self, cell: Cell, end: End) -> str:
        """How a cell ended, in words."""
        folder, deadline = self._out / cell.folder, time.monotonic() + _SETTLE
        while end.code == 0 and not _is_whole(folder) and time.monotonic() < deadline:
            time.sleep(1.0)  # another machine has written it
        status = cells.status(folder)
        if status == "completed":
            key = self._plan.config.select_by
            scored = cells.scores_by_round(folder)
            return f"{key} {scored[max(scored)].get(key, math.nan):.4f}"
        reason = (read_run(folder).get("reason") if end.code == 1 else None) or self._death(cell, end)
        return f"{'diverged' if status == 'diverged' else 'failed'}: {reason}"

    def _is_settled(self, cell: Cell) -> bool:
        return cells.is_settled(self._out / cell.folder, cell.facts())


def _is_whole(folder: Path) -> bool:
    """Whether all that a run has written is seen here: files of a shared file system do not all appear at once."""
    try:
        return bool(cells.scores_by_round(folder))
    except RunFolderError:
        return False
