"""The part that all clusters share: the command of a trial, what its machine must see, and how it is stopped."""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.section import resolve
from common.config.site import SiteConfig
from common.system.files import is_held
from deploy.experiment import trial as trial_program
from deploy.experiment.places.job import fingerprint
from deploy.experiment.places.place import UNSEEN, Trial

ROOT = Path(__file__).resolve().parents[3]
NO_LIMIT = 10**6  # trials that are handed over at a time: the cluster has a queue of its own
RULE = "trials need the same files at the same absolute paths on every machine, as on a shared file system"
_GONE = 30.0  # seconds in which stopped trials are gone


def sees(federation: FederationConfig) -> dict[str, str]:
    """All that a trial's machine must find: the code, the Python, the models, the site files, and all rows."""
    paths = [Path(__file__), Path(sys.executable)]
    rows = federation.evaluation.server
    own = [federation.model.path, rows.path if rows is not None else None]
    paths += [Path(path) for path in own if path is not None]
    for site in map(Path, federation.local.sites if federation.local is not None else ()):
        told = load(site, SiteConfig)
        named = [told.data.path, told.model.path if told.model is not None else None]
        paths += [site, *(resolve(path, site) for path in named if path is not None)]
    return {str(path): fingerprint(str(path)) for path in paths}


def job_of(trial: Trial, threads: int) -> tuple[list[str], dict[str, str], Mapping[str, str], str, int]:
    """The arguments of ``deploy.experiment.places.job.work``."""
    own = [str(trial.folder), trial.attempt, "resume" if trial.resume else "new", str(threads)]
    command = [sys.executable, "-P", trial_program.__file__, *own]
    code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": code, "OMP_NUM_THREADS": str(threads)}
    lock = str(trial.folder / trial_program.LOCK)
    seen = {**sees(trial.federation), lock: fingerprint(lock)}
    return command, env, seen, str(trial.folder / trial_program.LOG), UNSEEN


def wait_until_gone(trials: Iterable[Trial]) -> None:
    """Wait until no process works in the folders of stopped trials."""
    deadline, left = time.monotonic() + _GONE, [trial.folder / trial_program.LOCK for trial in trials]
    while (left := [lock for lock in left if is_held(lock)]) and time.monotonic() < deadline:
        time.sleep(0.2)
