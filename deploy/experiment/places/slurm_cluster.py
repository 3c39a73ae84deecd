"""Trials on a Slurm cluster, a job each, handed over by submitit."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.config.federation import FederationConfig
from common.errors import ConfigError, LaunchError
from common.system.processes import last_lines
from common.text import SENTENCE, one_line
from deploy.experiment.places import job
from deploy.experiment.places.cluster import NO_LIMIT, job_of, wait_until_gone
from deploy.experiment.places.place import End, Trial

_POLL, _LOOK = 1.0, 5.0  # seconds between two looks for results, and at Slurm's queue
_MISSED = 3  # looks at the queue without a job after which it is gone: its result may show later than its end


class SlurmJobs:
    """See ``Place``.

    Args:
        folder: folder for submitit's files, on a file system that all machines share.
        slots: most trials at a time; None: no limit but Slurm's.
        cpus: CPUs of each trial, and threads that PyTorch may use.
        gpus: GPUs of each trial.
        options: further options of sbatch, such as ``partition`` and ``time``.

    Raises:
        ConfigError: submitit is not installed, or the number of GPUs is none of Slurm's.
        LaunchError: this machine has no sbatch.
    """

    def __init__(self, folder: Path, slots: int | None, cpus: int, gpus: float, options: Mapping[str, str]) -> None:
        self.slots, self._cpus = slots or NO_LIMIT, cpus
        self._folder = folder.resolve()
        self._running: dict[str, tuple[Trial, Any]] = {}
        self._missed: dict[str, int] = {}
        self._looked = 0.0
        if gpus != int(gpus):
            raise ConfigError(f"--gpus-per-trial {gpus:g}: Slurm gives whole GPUs")
        try:
            submitit = importlib.import_module("submitit")
        except ImportError:
            needs = "`--on slurm` needs a package that is not installed; run: pip install 'fedspan[slurm]'"
            raise ConfigError(needs) from None
        for program in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise LaunchError(f"`--on slurm` needs Slurm's programs, and {program} is not on PATH")
        self._failed: type[Exception] = submitit.core.utils.FailedJobError
        self._executor = submitit.SlurmExecutor(folder)
        wanted: dict[str, Any] = {"job_name": "fedspan", "cpus_per_task": cpus, "additional_parameters": dict(options)}
        # Without a time of the user's, the partition's default holds, not submitit's five minutes.
        self._executor.update_parameters(time=None, **wanted, **({"gpus_per_node": int(gpus)} if gpus else {}))

    def check(self, federation: FederationConfig, summary: Path) -> None:
        """See ``Place``; each job tells when it begins, since Slurm reaches no machine sooner."""

    def start(self, trial: Trial) -> None:
        """See ``Place``."""
        try:
            handed = self._executor.submit(job.work_and_tell, str(self._told(trial)), *job_of(trial, self._cpus))
        except (self._failed, subprocess.SubprocessError, OSError) as error:
            said = str(error).strip().splitlines()
            raise LaunchError(f"sbatch took no trial: {one_line(' '.join(said[-3:]), SENTENCE)}") from None
        self._running[handed.job_id] = trial, handed

    def ended(self, patience: float) -> Iterator[tuple[Trial, End]]:
        """See ``Place``."""
        deadline = time.monotonic() + patience
        while True:
            over = {}
            for name in self._gone():
                why = last_lines(self._running[name][1].paths.stderr)
                over[name] = End(None, f"Slurm ended its job {name}{why and f' ({why})'}")
            for name, (trial, _) in self._running.items():
                if (told := self._told(trial)).exists():
                    over[name] = End(*json.loads(told.read_text()))
            for name, end in over.items():
                trial, _ = self._running.pop(name)
                self._missed.pop(name, None)
                yield trial, end
            if over or time.monotonic() >= deadline:
                return
            time.sleep(_POLL)

    def stop(self) -> None:
        """See ``Place``."""
        if self._running:
            with contextlib.suppress(OSError):
                subprocess.run(["scancel", *self._running], check=False, capture_output=True)  # noqa: S603, S607
        wait_until_gone(trial for trial, _ in self._running.values())
        self._running.clear()

    def close(self) -> None:
        """See ``Place``."""
        self.stop()

    def _gone(self) -> list[str]:
        """Jobs that Slurm's queue has not held for some looks."""
        if time.monotonic() < self._looked + _LOOK:
            return []
        self._looked = time.monotonic()
        command = ["squeue", "--noheader", "--format=%i", f"--user={os.getuid()}"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if told.returncode:  # Slurm's controller is busy or away; the next look may tell
            return []
        queued = told.stdout.split()
        self._missed = {name: 0 if name in queued else self._missed.get(name, 0) + 1 for name in self._running}
        return [name for name, missed in self._missed.items() if missed >= _MISSED]

    def _told(self, trial: Trial) -> Path:
        """The file in which the machine of a job tells how it ended; submitit's own results are pickled."""
        return self._folder / f"{trial.attempt}.json"
