"""Trials on this machine: processes that are forked from one that has imported everything."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from common.config.federation import FederationConfig
from deploy.experiment.places.place import End, Trial
from deploy.experiment.trial import run_trial

_GRACE = 5.0  # seconds between asking a trial to end and ending it
_PROCESS = "deploy.experiment.trial_process"  # by name: only the fork server imports what it does


class LocalJobs:
    """See ``Place``.

    Args:
        slots: number of trials at a time.
        threads: number of threads that PyTorch may use in each.
    """

    def __init__(self, slots: int, threads: int) -> None:
        self.slots, self._threads = slots, threads
        self._running: dict[BaseProcess, tuple[Trial, float]] = {}

    def check(self, federation: FederationConfig, summary: Path) -> None:
        """See ``Place``; this machine sees what the experiment sees."""

    def start(self, trial: Trial) -> None:
        """See ``Place``."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_PROCESS])
        arguments = trial.folder, trial.attempt, trial.resume, self._threads
        process = context.Process(target=run_trial, args=arguments, daemon=True)
        process.start()
        self._running[process] = trial, time.monotonic()

    def ended(self, patience: float) -> Iterator[tuple[Trial, End]]:
        """See ``Place``."""
        wait([process.sentinel for process in self._running], patience)
        for process in [p for p in self._running if not p.is_alive()]:
            trial, began = self._running.pop(process)
            process.join()
            yield trial, End(process.exitcode, seconds=time.monotonic() - began)

    def stop(self) -> None:
        """See ``Place``."""
        for process in self._running:
            process.terminate()
        deadline = time.monotonic() + _GRACE
        for process in self._running:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._running.clear()

    def close(self) -> None:
        """See ``Place``."""
        self.stop()
