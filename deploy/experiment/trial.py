"""One cell of an experiment: a whole federation in a process of its own.

That process is forked from one that has imported everything, so a cell costs no import, gives all of its memory back at
its end, and can be killed without harm.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from common.config.federation import FederationConfig
from common.errors import DIVERGED, RunFolderError
from common.system.files import write_atomically
from common.system.processes import die_with_parent
from server.run.folder import FEDERATION, changes, write_federation

SUMMARY = "experiment.json"  # the summary of the whole experiment, in the experiment's folder
FACTS = "cell.json"
LOG = "log"
_LEDGERS = "ledgers"
_PROCESS = "deploy.experiment.trial_process"  # by name: only the fork server imports what it does


def outcome(folder: Path) -> dict[str, Any]:
    """The content of a cell's ``run.json``; empty when the cell was not started."""
    file = folder / "run.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def status(folder: Path) -> str:
    """A cell's status: missing, running (or killed), completed, failed, or diverged (failed by its learning rate)."""
    told = outcome(folder)
    if told.get("status") == "failed" and DIVERGED & {*told.get("causes", {}).values()}:
        return "diverged"
    return str(told.get("status", "missing"))


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


def start(folder: Path, federation: FederationConfig, facts: Mapping[str, Any], threads: int) -> BaseProcess:
    """Start a cell, or resume a killed one where that changes no result.

    Args:
        folder: the cell's folder; the cell must not be settled.
        federation: the cell's federation file, with absolute paths.
        facts: the cell's fields, among them ``final`` (whether it is evaluated on the test set), and ``digests`` of
            its data, by name.
        threads: number of threads that PyTorch may use.
    """
    resume = _goes_on(folder, facts)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / FACTS, json.dumps(facts, indent=2) + "\n")
        write_federation(folder, federation)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PROCESS])
    process = context.Process(target=_run, args=(folder, resume, threads), daemon=True)
    process.start()
    return process


def _run(folder: Path, resume: bool, threads: int) -> None:
    """The process of a cell."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the experiment, which ends its cells
    with (folder / LOG).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    from deploy.experiment.trial_process import run

    run(folder / FEDERATION, folder, folder / _LEDGERS, threads, resume=resume)
