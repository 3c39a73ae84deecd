"""One cell of an experiment: a whole federation in a process of its own, which can be killed without harm.

On this machine the process is forked from one that has imported everything, so that a cell costs no import; elsewhere
it is a program: ``python -P trial.py FOLDER ATTEMPT new|resume THREADS PARENT``.

A process may outlive the experiment that started it, on a machine that is cut off or in a cluster's queue. So it locks
the cell's folder while it works, and ends at once when the folder was given to a later attempt.
"""

import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from common.config.federation import FederationConfig
from common.errors import DIVERGED, RunFolderError, kind_of
from common.system.files import hold, write_atomically
from common.system.processes import die_with_parent
from common.text import SENTENCE, one_line
from server.run.folder import FEDERATION, changes, read_lines, read_run, write_federation
from server.run.records import SERVER, evaluations

FACTS = "cell.json"
LOG = "log"
LOCK = ".trial"  # locked by the process that works in the folder; holds the mark of the newest attempt
_LEDGERS = "ledgers"
_PATIENCE = 10.0  # seconds to wait for the lock of a process that is about to end


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise a RunFolderError when a file of a cell that is read in the block is not as a run has written it."""
    try:
        yield
    except (
        FileNotFoundError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        why = f"{kind_of(error)}: {one_line(str(error), SENTENCE)}"
        raise RunFolderError(
            f"{folder}: a file of this run is damaged ({why}); remove the folder, it is run again"
        ) from None


def status(folder: Path) -> str:
    """A cell's status: missing, running (or killed), completed, failed, or diverged (failed by its learning rate)."""
    told = read_run(folder)
    with reading(folder):
        if told.get("status") == "failed" and DIVERGED & {*told.get("causes", {}).values()}:
            return "diverged"
    return str(told.get("status", "missing"))


def scores_by_round(folder: Path) -> dict[int, dict[str, float]]:
    """The server's finite scores by round; empty when the cell did not end well."""
    if status(folder) != "completed":
        return {}
    with reading(folder):
        found = evaluations(read_lines(folder / "metrics.jsonl")).get(SERVER, {})
        check_last(found, read_run(folder))
        return {number: {k: v for k, v in told.items() if v is not None} for number, told in found.items()}


def check_last(evaluated: Collection[int], run: Mapping[str, Any]) -> None:
    """Raise a ValueError when a run that ended well has lost numbers; for ``reading``.

    Args:
        evaluated: rounds after which the server has evaluated.
        run: the content of its run.json; an earlier version did not note the last round.
    """
    last = run.get("last_round", max(evaluated, default=0))
    if last not in evaluated:
        raise ValueError(f"metrics.jsonl does not hold all of {last} rounds")


def is_settled(folder: Path, facts: Mapping[str, Any]) -> bool:
    """True when a cell needs no rerun: it completed, or it is a learning-rate trial that diverged."""
    return status(folder) in (("completed",) if facts["final"] else ("completed", "diverged"))


def refuse_changed(folder: Path, federation: FederationConfig, facts: Mapping[str, Any]) -> None:
    """Raise a RunFolderError when a cell that is settled, or would go on, was begun with other settings or data.

    Args:
        folder: the cell's folder.
        federation: the cell's federation file, with absolute paths.
        facts: see ``start``; cells of earlier versions have no ``digests``, so their data is not compared.
    """
    file = folder / FEDERATION
    if not file.exists() or not (is_settled(folder, facts) or _goes_on(folder, facts)):
        return
    with reading(folder):
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), federation.model_dump(mode="json")
        how = changes(before, now)
        if not how:
            other = sorted({*before["local"]["sites"]} ^ {*now["local"]["sites"]})
            how = f"`data.sites` has other files: {', '.join(other[:3])}" if other else ""
        if not how:
            digests = json.loads((folder / FACTS).read_text(encoding="utf-8")).get("digests", {})
            changed = [what for what, digest in digests.items() if facts["digests"].get(what) != digest]
            how = f"{', '.join(changed[:3])}: other content" if changed else ""
    if how:
        raise RunFolderError(f"{folder}: the experiment has changed since this cell began: {how}; choose another --out")


def _goes_on(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a killed cell is resumed after its last round.

    A final cell is not resumed: its new sites would hold nothing, so the server would send tensors again, and the bytes
    of the run would not be those of an uninterrupted one.
    """
    return not facts["final"] and status(folder) == "running"


def prepare(folder: Path, federation: FederationConfig, facts: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Make a cell's folder ready for its process.

    Args:
        folder: the cell's folder; the cell must not be settled.
        federation: the cell's federation file, with absolute paths.
        facts: the cell's fields, among them ``final`` (whether it is evaluated on the test set), and ``digests`` of
            its data, by name.

    Returns:
        The attempt's mark, and whether the process is to resume a killed one, where that changes no result; None: a
        process of an earlier attempt is still at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder / LOCK, patience=0.0)
    if lock is None:
        return None
    try:
        resume, attempt = _goes_on(folder, facts), uuid.uuid4().hex
        os.ftruncate(lock, 0)
        os.pwrite(lock, attempt.encode(), 0)
        os.fsync(lock)
        if not resume:
            for old in [old for old in folder.iterdir() if old.name != LOCK]:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            write_atomically(folder / FACTS, json.dumps(facts, indent=2) + "\n")
            write_federation(folder, federation)
    finally:
        os.close(lock)
    return attempt, resume


def run_trial(folder: Path, attempt: str, resume: bool, threads: int) -> None:
    """The process of a cell; see ``prepare``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the experiment, which ends its cells
    lock = hold(folder / LOCK, _PATIENCE)  # until this process ends
    if lock is None:
        sys.exit(f"{folder}: another process is at work on this cell")
    if os.pread(lock, 64, 0).decode() != attempt:
        sys.exit(f"{folder}: a later call of the experiment has begun this cell anew")
    with (folder / LOG).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    from deploy.experiment.trial_process import run

    run(folder / FEDERATION, folder, folder / _LEDGERS, threads, resume=resume)


def main(folder: str, attempt: str, how: str, threads: str, parent: str) -> None:
    """The program; ``parent`` is the process that started it."""
    die_with_parent()
    if os.getppid() != int(parent):  # it has died before this process could ask the kernel to be told
        sys.exit(1)
    run_trial(Path(folder), attempt, how == "resume", int(threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
