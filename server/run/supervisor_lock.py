"""The supervisor's PID file and lock: which process supervises a run, and how to stop it (decision 011).

supervisor.json   the supervisor's process, how it was started, and at the end the outcome of the run
.supervisor       lock file, locked while the supervisor lives; the kernel frees the lock when the process dies
"""

import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ValidationError

from common.errors import LaunchError, RunFolderError
from common.system.files import hold, is_held, write_atomically
from server.run.folder import in_use

_FILE, _LOCK = "supervisor.json", ".supervisor"
_SAME_BIRTH = 2.0  # seconds: when the clock is corrected, a process's start time moves a little


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user, or the machine, asked the run to stop."""


class Supervisor(BaseModel):
    """The process that supervises a run, or supervised it last.

    Attributes:
        pid: the process id.
        born: Unix time of the process's start, to tell it from a later process with the same id.
        host: the process's machine or container.
        command: the command that started it; ``folder``: its working directory.
        outcome: how the run ended; None while the run is under way, or when the supervisor was killed.
        reason: the reason of a failure or an interruption.
    """

    pid: int
    born: float
    host: str
    command: list[str]
    folder: str
    outcome: Literal["completed", "failed", "interrupted"] | None = None
    reason: str | None = None

    def to_go_on(self) -> str:
        """The command that resumes the run."""
        resume = [] if "--resume" in self.command else ["--resume"]
        return f"cd {shlex.quote(self.folder)} && {shlex.join([*self.command, *resume])}"


@contextlib.contextmanager
def supervising(run_dir: Path) -> Iterator[None]:
    """Hold the supervisor's lock on a run, and note the outcome at the end.

    Raises:
        RunFolderError: another process supervises the run, or the run's folder cannot be written.
    """
    own = Supervisor(
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        host=platform.node(),
        command=sys.orig_argv,
        folder=str(Path.cwd()),
    )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = hold(run_dir / _LOCK)
        if lock is None:
            raise RunFolderError(f"{run_dir}: another supervisor looks after this run; see fedspan status")
        _write(run_dir, own)
    except OSError as error:
        raise RunFolderError(f"run folder {run_dir} cannot be written: {error.strerror or error}") from None
    try:
        yield
        own.outcome = "completed"
    except BaseException as error:
        own.outcome, own.reason = "interrupted" if isinstance(error, Interrupted) else "failed", str(error)
        raise
    finally:
        with contextlib.suppress(OSError):  # on a full disk the free lock alone shows that the supervisor has ended
            _write(run_dir, own)
        os.close(lock)


def _write(run_dir: Path, supervisor: Supervisor) -> None:
    write_atomically(run_dir / _FILE, supervisor.model_dump_json(indent=2) + "\n")


def supervisor_of(run_dir: Path) -> Supervisor | None:
    """The process that supervises a run, or supervised it last; None when there never was one.

    Raises:
        RunFolderError: supervisor.json cannot be read.
    """
    try:
        return Supervisor.model_validate_json((run_dir / _FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunFolderError(f"{run_dir / _FILE} cannot be read: {error}") from None


def is_supervised(run_dir: Path) -> bool:
    """Whether a run has a living supervisor."""
    return is_held(run_dir / _LOCK)


def stop(run_dir: Path, deadline: float) -> bool:
    """Ask a run's supervisor to end the run with all processes, and wait for the end; False: there is no supervisor.

    Args:
        run_dir: the run's folder.
        deadline: seconds to wait.

    Raises:
        LaunchError: the supervisor cannot be reached from here, or has not ended in time.
    """
    found = supervisor_of(run_dir)
    if found is None or not is_supervised(run_dir):
        if in_use(run_dir):
            raise LaunchError(f"{run_dir}: its server has no supervisor; stop it with `flwr stop`, by its flower_run")
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(found.pid)
        if found.host != platform.node() or abs(process.create_time() - found.born) > _SAME_BIRTH:
            raise LaunchError(f"{run_dir}: its supervisor is process {found.pid} on {found.host}; stop it there")
        process.terminate()
    until = time.monotonic() + deadline
    while is_supervised(run_dir):
        if time.monotonic() > until:
            raise LaunchError(f"{run_dir}: process {found.pid} has not ended within {deadline:g} seconds")
        time.sleep(0.1)
    return True
