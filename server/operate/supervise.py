"""Runs a federation to its end although its server may die: ``fedspan serve`` and ``fedspan run``.

Flower marks a run failed when its ServerApp or SuperLink dies, and never restarts it. The supervisor notices the death,
restarts the SuperLink on the same database, which still has the SuperNodes' registrations, and submits a run that
resumes after the last checkpoint. A run that ends with a reason (too few sites, a full disk) is not restarted
(decision 011).
"""

import argparse
import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from common.config.federation import FederationConfig
from common.errors import FedSpanError, LaunchError, RunFailed
from common.system.command import FAILED, INTERRUPTED
from common.system.files import keep_private, make_private
from common.system.processes import ProcessGroup, Started, last_lines
from server.operate.progress import Display, teller
from server.operate.prometheus import exposed
from server.run.folder import CHECKPOINTS, in_use, read_lines, read_run, write_federation
from server.run.supervisor_lock import Interrupted, supervising
from server.superlink import control, nodes, security
from server.superlink.bundle import ROOT, make_bundle
from server.superlink.process import OwnSuperLink, start, wait_for

POLL_SECONDS = 0.5
log = logging.getLogger(__name__)
_LEAST_SPACE = 2**20  # bytes
_DYING_SECONDS = 1.0  # from the last answer of a SuperLink that is killed to the end of its process
_ASK_SECONDS = 10.0  # between two queries to the SuperLink for the state of a run that has written nothing yet


class Supervised:
    """One federation, submitted again whenever its server dies.

    Args:
        federation: the federation file's content, with absolute paths. It is written into the run's folder, where the
            server reads it, so that after a restart it is the same even if the operator's own file has changed.
        run_dir: the run's folder; must be on this machine.
        group: starts and ends the processes.
        superlink: the SuperLink to start; or the name, in Flower's configuration, of a running SuperLink.
        standing: whether `fedspan server start` starts and supervises the SuperLink.
        env: environment of all processes.
        tell: called with a sentence about every death.
        tries: how many times in a row the run is submitted again without finishing another round.

    Raises:
        ConfigError: the app cannot be bundled.
    """

    def __init__(
        self,
        federation: FederationConfig,
        run_dir: Path,
        group: ProcessGroup,
        superlink: OwnSuperLink | str,
        env: Mapping[str, str],
        tell: Callable[[str], None],
        *,
        tries: int,
        standing: bool = False,
    ) -> None:
        self._federation, self._run_dir, self._group = federation, run_dir, group
        self._own = superlink if isinstance(superlink, OwnSuperLink) and not standing else None
        self._superlink = superlink
        link = superlink if isinstance(superlink, OwnSuperLink) else None
        self._nodes = nodes.following(link, run_dir, tell, keeps=not standing)
        self._env, self._tell, self._limit = env, tell, tries
        self._process: Started | None = None
        self._bundle = make_bundle(ROOT)  # once: a resumed run must use the code that the run began with
        self._run_id = 0
        self._deaths, self._newest, self._asked = 0, "", 0.0

    def start_superlink(self) -> None:
        """Start the SuperLink, or wait for the standing one, until it listens.

        Raises:
            LaunchError: the SuperLink ended (as when its port is taken), did not listen in time, or did not take the
                register of sites.
        """
        if self._own is not None:
            self._process = start(self._own, self._group, self._env)
        elif isinstance(self._superlink, OwnSuperLink):
            wait_for(self._superlink)
        if self._nodes is not None:
            self._nodes.begin()

    def submit(self, *, resume: bool) -> None:
        """Submit the run to the SuperLink.

        Raises:
            LaunchError: the SuperLink did not take it.
            RunFolderError: the run's folder cannot be written.
        """
        config: dict[str, str | int] = {
            "federation": str(write_federation(self._run_dir, self._federation)),
            "run-dir": str(self._run_dir),
            "resume": resume,
        }
        security.note(self._run_dir, self._bundle, self._superlink, self._federation)
        self._newest = self._newest or self._newest_checkpoint()
        with contextlib.suppress(LaunchError):  # a SuperLink that ends just now; other errors show at the next call
            control.stop_runs(self._superlink, self._run_dir)
        try:
            self._run_id = control.start_run(self._superlink, self._bundle, config)
        except LaunchError:
            if not self._link_died(_DYING_SECONDS):
                raise
            self._run_id = 0  # `finished` starts the SuperLink again
        self._asked = time.monotonic()

    def finished(self) -> bool:
        """Check the run once, restart what has died; returns whether the run has ended well. Call repeatedly.

        Raises:
            RunFailed: the run has failed; the text has the reason. Or the server died too often.
            Interrupted: the run was stopped by another process.
        """
        if self._nodes is not None:
            self._nodes.look()
        begun = self._is_ours(read_run(self._run_dir))
        at_work = in_use(self._run_dir)
        outcome = read_run(self._run_dir)  # read again: a server writes its outcome before it frees the lock
        if self._is_ours(outcome) and outcome["status"] == "failed":
            raise RunFailed(str(outcome["reason"]))
        link_died = self._link_died()
        if self._is_ours(outcome) and outcome["status"] == "interrupted" and not link_died:
            raise Interrupted("Flower, or a signal to the server")
        if begun and outcome["status"] == "completed" and not at_work:
            draw_report(self._run_dir, self._tell)
            return True
        if link_died:
            self._again("the SuperLink died")
        elif (begun and not at_work) or (not begun and self._has_ended()):
            self._again("the server died")
        return False

    def end(self) -> None:
        """Stop the run on a SuperLink that was not started here; our own SuperLink ends with the process group."""
        if self._own is None:
            try:
                control.stop_runs(self._superlink, self._run_dir)
            except LaunchError as error:
                self._tell(f"Flower's run {self._run_id} may go on: {error}")

    def _is_ours(self, outcome: dict[str, Any]) -> bool:
        return str(outcome.get("flower_run")) == str(self._run_id)

    def _link_died(self, seconds: float = 0.0) -> bool:
        """Whether the SuperLink that was started here has ended, or ends within ``seconds``."""
        if self._process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.process.wait(seconds)
        return self._process.process.returncode is not None

    def _has_ended(self) -> bool:
        """Whether the SuperLink reports the run as over, although the server never wrote to the run's folder."""
        if time.monotonic() < self._asked + _ASK_SECONDS:
            return False
        try:
            return control.is_over(self._superlink, self._run_id)
        except LaunchError:  # the machine is busy, or the SuperLink has just died
            return False
        finally:
            self._asked = time.monotonic()

    def _again(self, what: str) -> None:
        """Submit the run again, after the last checkpoint.

        Raises:
            RunFailed: the run was submitted again too often, or the disk is full.
        """
        newest = self._newest_checkpoint()
        if newest != self._newest:
            self._newest, self._deaths = newest, 0
        self._deaths += 1
        if shutil.disk_usage(self._run_dir).free < _LEAST_SPACE:
            raise RunFailed(f"{what}; the disk of {self._run_dir} is full: make room, then go on with --resume")
        if self._deaths > self._limit:
            log = self._process.log if self._process is not None else None
            end = f"; {log} ends with: {last_lines(log)}" if log is not None else ""
            raise RunFailed(f"{what} {self._deaths} times without finishing another round{end}")
        self._tell(f"{what}; the run goes on after its last checkpoint (try {self._deaths} of {self._limit})")
        if self._process is not None and self._link_died():
            self._group.forget(self._process)  # and its ServerApp with it
            self.start_superlink()
        elif self._own is None:
            self.start_superlink()
        self.submit(resume=(self._run_dir / "run.json").exists())

    def _newest_checkpoint(self) -> str:
        return max((folder.name for folder in (self._run_dir / CHECKPOINTS).glob("round-*")), default="")


def follow(supervised: Supervised, run_dir: Path, console: Console, seen: int, watch: Callable[[], None]) -> None:
    """Show a submitted run until it has ended well.

    Args:
        supervised: the run.
        run_dir: the run's folder.
        console: the terminal.
        seen: number of lines of events.jsonl that were written before.
        watch: called between two checks of the run.

    Raises:
        RunFailed: the run failed.
    """
    display = Display(console, run_dir.name)
    try:
        over = False
        while not over:
            time.sleep(POLL_SECONDS)
            try:
                over = supervised.finished()
            finally:
                events = read_lines(run_dir / "events.jsonl")
                display.show(events[seen:])
                seen = len(events)
            watch()
    except Interrupted:
        supervised.end()
        raise
    finally:
        display.close()


def draw_report(run_dir: Path, tell: Callable[[str], None]) -> None:
    """Write a finished run's report; whatever prevents that, the run has ended well."""
    from server.report.write import write_report  # draws with matplotlib

    try:
        write_report(run_dir)
    except Exception as error:  # numbers and texts in it are the sites'
        log.exception("the report of %s cannot be drawn", run_dir)
        reason = str(error) if isinstance(error, FedSpanError) else type(error).__name__
        tell(f"the run has ended well, but its report cannot be drawn ({reason}); see fedspan report {run_dir.name}")


def make_folder(run_dir: Path) -> None:
    """Make a run's folder for this account alone; all later files of this process are for this account alone, too.

    Raises:
        OSError: the folder cannot be made.
    """
    keep_private()
    make_private(run_dir)
    (run_dir / "logs").mkdir(exist_ok=True)


def run_until_done(run_dir: Path, options: argparse.Namespace, work: Callable[[], None]) -> int:
    """Hold the supervisor's lock while ``work`` runs the run, print how it ended, and return the exit code.

    Raises:
        FedSpanError: the run could not start: it has another supervisor, or the metrics' port is taken.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    say = teller(partial(print, file=sys.stderr), run_dir.name, logging.ERROR)
    try:
        with exposed(run_dir, options.metrics_address, options.metrics_port), supervising(run_dir):
            try:
                work()
            except FedSpanError as error:
                raise RunFailed(str(error)) from error
    except Interrupted as interruption:
        say(f"stopped by {interruption}")
        return INTERRUPTED
    except RunFailed as failure:
        say(f"run failed: {failure}")
        return FAILED
    report = run_dir / "report.html"
    results = ([f"report: {report}"] if report.exists() else []) + [f"model:  {run_dir / 'model'}"]
    teller(print, run_dir.name, logging.INFO)("\n".join(results))
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)
