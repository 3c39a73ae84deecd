"""Runs a federation to its end although its server may die: ``python -m server.operate.supervise FEDERATION.yaml``.

Flower marks a run failed when its ServerApp or its SuperLink dies, and never starts it again. What is here notices,
starts the SuperLink again on the same database, from which the SuperNodes' registrations come back, and submits a run
that goes on after the last checkpoint. A run that ends with a reason (too few sites, a full disk) has ended.

Exit codes: 0 the run ended well, 1 it failed, 2 a file or an argument is wrong, 130 interrupted.
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

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.errors import FedSpanError, LaunchError, RunFailed, RunFolderError
from common.system.logs import configure as configure_logs
from common.system.processes import ProcessGroup, Started, last_lines, listens
from server.operate.progress import Display, teller
from server.operate.prometheus import exposed
from server.report.write import write_report
from server.run import bundle_signatures
from server.run.folder import CHECKPOINTS, check_resumable, in_use, read_lines, read_run, refuse_existing
from server.run.supervisor_lock import Interrupted, looking_after
from server.superlink import control, nodes, registry, signatures
from server.superlink.bundle import make_bundle
from server.superlink.process import MALLOC, OwnSuperLink, Tls, environment

ROOT = Path(__file__).resolve().parents[2]  # holds pyproject.toml, from which Flower bundles the app
POLL_SECONDS = 0.5
TRIES = 3
START_SECONDS = 90.0  # a SuperLink that does not listen by then is given up
_LEAST_SPACE = 2**20  # bytes
_DYING_SECONDS = 1.0  # from the last answer of a SuperLink that is killed to the end of its process
_ASK_SECONDS = 10.0  # between two questions to the SuperLink for the state of a run that shows no life


class Supervised:
    """One federation, submitted again whenever its server dies.

    Args:
        source: the federation file.
        run_dir: the run's folder; this machine must see it.
        group: where processes are started.
        superlink: the SuperLink to start; or the name of a connection in Flower's configuration, of one that runs.
        env: environment of all processes.
        tell: is told of every death.
        tries: how often in a row the run is submitted again without having finished another round.

    Raises:
        ConfigError: the app cannot be bundled.
    """

    def __init__(
        self,
        source: Path,
        run_dir: Path,
        group: ProcessGroup,
        superlink: OwnSuperLink | str,
        env: Mapping[str, str],
        tell: Callable[[str], None],
        *,
        tries: int = TRIES,
    ) -> None:
        self._source, self._run_dir, self._group = source, run_dir, group
        self._own = superlink if isinstance(superlink, OwnSuperLink) else None
        self._superlink = superlink
        self._nodes = nodes.following(self._own, run_dir, tell)
        self._env, self._tell, self._limit = env, tell, tries
        self._process: Started | None = None
        self._bundle = make_bundle(ROOT)  # once: the run goes on with the code that it began with
        self._run_id = 0
        self._deaths, self._newest, self._asked = 0, "", 0.0

    def start_superlink(self) -> bool:
        """Start the SuperLink and wait until it listens; False when it ended, as it does when a port is taken.

        Raises:
            LaunchError: it did not listen in time, or does not take the register of sites.
        """
        if self._own is None:
            return True
        home = Path(self._env["FLWR_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(self._own.connection(), encoding="utf-8")
        self._process = started = self._group.start("superlink", self._own.command(home), {**MALLOC, **self._env})
        deadline = time.monotonic() + START_SECONDS
        while not (listens(self._own.port) and listens(int(self._own.fleet.rpartition(":")[2]))):
            if started.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise LaunchError(f"the SuperLink did not listen within {START_SECONDS:g} seconds; see {started.log}")
            time.sleep(0.1)
        if self._nodes is not None:
            self._nodes.begin()
        return True

    def submit(self, *, resume: bool) -> None:
        """Hand the app to the SuperLink.

        Raises:
            LaunchError: the SuperLink did not take it.
        """
        config: dict[str, str | int] = {
            "federation": str(self._source),
            "run-dir": str(self._run_dir),
            "resume": resume,
        }
        self._newest = self._newest or self._newest_checkpoint()
        with contextlib.suppress(LaunchError):  # one that ends just now; what else is wrong shows at the next call
            control.stop_runs(self._superlink, self._run_dir)
        try:
            self._run_id = control.start_run(self._superlink, self._bundle, config)
        except LaunchError:
            if not self._link_died(_DYING_SECONDS):
                raise
            self._run_id = 0  # `finished` starts the SuperLink again
        self._asked = time.monotonic()

    def finished(self) -> bool:
        """Look after the run once; whether it has ended well. To be called again and again.

        Raises:
            RunFailed: the run has failed, with its reason; or its server died too often.
            Interrupted: the run was stopped, but not here.
        """
        if self._nodes is not None:
            self._nodes.look()
        begun = self._is_ours(read_run(self._run_dir))
        at_work = in_use(self._run_dir)
        outcome = read_run(self._run_dir)  # once more: a server that has ended wrote it before it let go
        if self._is_ours(outcome) and outcome["status"] == "failed":
            raise RunFailed(str(outcome["reason"]))
        link_died = self._link_died()
        if self._is_ours(outcome) and outcome["status"] == "interrupted" and not link_died:
            raise Interrupted("Flower, or a signal to the server")
        if begun and outcome["status"] == "completed" and not at_work:
            write_report(self._run_dir)
            return True
        if link_died:
            self._again("the SuperLink died")
        elif (begun and not at_work) or (not begun and self._has_ended()):
            self._again("the server died")
        return False

    def end(self) -> None:
        """End the run on a SuperLink that is not ours; ours ends with the group."""
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
        """Whether the SuperLink says that the run is over, although it has not begun to write its folder."""
        if time.monotonic() < self._asked + _ASK_SECONDS:
            return False
        try:
            return control.is_over(self._superlink, self._run_id)
        except LaunchError:  # a machine that is busy, or a SuperLink that has just died
            return False
        finally:
            self._asked = time.monotonic()

    def _again(self, what: str) -> None:
        """Go on after the last checkpoint.

        Raises:
            RunFailed: this has been tried too often, or the disk is full.
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
            if not self.start_superlink():
                raise RunFailed(f"{what} and did not start again; {self._process.log} says more")
        self.submit(resume=(self._run_dir / "run.json").exists())

    def _newest_checkpoint(self) -> str:
        return max((folder.name for folder in (self._run_dir / CHECKPOINTS).glob("round-*")), default="")


def follow(supervised: Supervised, run_dir: Path, console: Console, seen: int, watch: Callable[[], None]) -> None:
    """Show a submitted run until it has ended well.

    Args:
        supervised: the run.
        run_dir: its folder.
        console: where it is shown.
        seen: lines of events.jsonl that are from before.
        watch: is called between two looks at the run.

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


def to_the_end(run_dir: Path, options: argparse.Namespace, work: Callable[[], None]) -> int:
    """Look after a run while ``work`` does it, and say how it ended; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    say = teller(partial(print, file=sys.stderr), run_dir.name, logging.ERROR)
    try:
        with exposed(run_dir, options.metrics_address, options.metrics_port), looking_after(run_dir):
            work()
    except Interrupted as interruption:
        say(f"stopped by {interruption}")
        return 130
    except FedSpanError as error:
        say(f"run failed: {error}")
        return 1
    teller(print, run_dir.name, logging.INFO)(f"report: {run_dir / 'report.html'}\nmodel:  {run_dir / 'model'}")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server.operate.supervise", description="Run a federation whose sites are elsewhere."
    )
    parser.add_argument("federation", type=Path, metavar="FEDERATION.yaml")
    add_run_options(parser)
    parser.add_argument(
        "--resume-if-begun", action="store_true", help="for service managers: start the run, go on with it, or end well"
    )
    parser.add_argument("--superlink", metavar="NAME", help="use the running SuperLink of this name in Flower's config")
    parser.add_argument("--port", type=int, default=8000, help="control port of the SuperLink that is started")
    parser.add_argument("--fleet-api-address", default="127.0.0.1:9092", metavar="HOST:PORT", help="for SuperNodes")
    parser.add_argument("--insecure", action="store_true", help="no TLS; only for a federation on one machine")
    for option in ("ca-certfile", "certfile", "keyfile"):
        parser.add_argument(f"--ssl-{option}", type=Path, metavar="FILE")
    parser.add_argument("--registry", type=Path, metavar="FILE", help="only sites in this register may connect")
    parser.add_argument(
        "--signature", type=Path, action="append", default=[], metavar="FILE", help="vouches for the code"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers from 0")
    return int(text)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that every way to run a federation has."""
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of this run's folder (default: the federation's name)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of this name, after its last checkpoint"
    )
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus's metrics there")
    parser.add_argument("--metrics-address", default="127.0.0.1", metavar="HOST", help="where (default: 127.0.0.1)")
    parser.add_argument(
        "--tries", type=_count, default=TRIES, help=f"restarts in a row without a finished round (default: {TRIES})"
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"run folder {path.parent} cannot be written: {error.strerror}") from None


def _superlink(parser: argparse.ArgumentParser, options: argparse.Namespace) -> OwnSuperLink | str:
    """Which SuperLink the options ask for; ends the program when they do not fit each other."""
    files = (options.ssl_ca_certfile, options.ssl_certfile, options.ssl_keyfile)
    if options.superlink is None and options.insecure == all(files):
        parser.error("give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, or --insecure, or --superlink")
    if options.registry is not None and not (options.superlink is None and all(files)):
        parser.error("--registry needs a SuperLink of its own with TLS: --ssl-ca-certfile and so on")
    for file in filter(None, files):
        if not file.is_file():
            parser.error(f"{file} does not exist")
    if options.superlink is not None:
        return str(options.superlink)
    tls = Tls(*(file.resolve() for file in files)) if all(files) else None
    return OwnSuperLink(options.port, options.fleet_api_address, tls, options.registry)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    superlink = _superlink(parser, options)
    try:
        configure_logs("supervisor")
        signed = signatures.read_signatures(options.signature, ROOT)
        if options.registry is not None:
            registry.read(options.registry)
        source = options.federation.resolve()
        federation = resolved(load(source, FederationConfig), source)
        run_dir: Path = (options.runs / (options.name or federation.name)).resolve()
        begun = read_run(run_dir) if options.resume_if_begun else {}
        if begun.get("status") == "completed":
            if not (run_dir / "report.html").exists():  # its supervisor died before it came to that
                write_report(run_dir)
            print(f"{run_dir}: the run has ended well, nothing is left to do")  # noqa: T201
            return 0
        resume = options.resume or bool(begun)
        check_resumable(run_dir, federation) if resume else refuse_existing(run_dir)
        _make_folder(run_dir / "logs")
    except (FedSpanError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2

    def work() -> None:
        console, seen = Console(), len(read_lines(run_dir / "events.jsonl"))
        env = environment(run_dir / "flwr", federation)
        bundle_signatures.keep(run_dir, signed)
        with ProcessGroup(run_dir / "logs") as group:
            run = Supervised(
                source, run_dir, group, superlink, env, teller(console.print, run_dir.name), tries=options.tries
            )
            if not run.start_superlink():
                log = run_dir / "logs" / "superlink.log"
                raise LaunchError(f"the SuperLink did not start; {log} ends with: {last_lines(log)}")
            run.submit(resume=resume)
            follow(run, run_dir, console, seen, lambda: None)

    return to_the_end(run_dir, options, work)


if __name__ == "__main__":
    sys.exit(main())
