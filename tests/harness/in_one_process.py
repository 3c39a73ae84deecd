"""A federation in one process: round loop, strategies and ClientApp are the true ones, Flower's transport is left out.

Every federation has a process of its own, forked from one that has imported everything, so it costs its work alone.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import yaml
from flwr.app import Context, Message

from common.errors import FedSpanError
from common.system.processes import die_with_parent, last_lines
from deploy.sandbox.tiny import make_federation
from server.run.folder import read_run
from tests.harness.results import events

SECONDS = 400.0
_EXPECTED: dict[str, Path] = {}


App = Callable[[Message, Context], Message]


def in_one_process(
    file: Path,
    name: str = "together",
    *,
    ends: str = "completed",
    resume: bool = False,
    cold: bool = False,
    app: App | None = None,
    killed_in: int | None = None,
) -> Path:
    """Run a federation to its end.

    Args:
        file: the federation file.
        name: of its run folder, beside those of the launcher.
        ends: the status that is to be in its run.json.
        resume: go on with the run of this name.
        cold: a site's session is new for every message, as when Flower starts a process for each.
        app: the sites', in place of FedSpan's.
        killed_in: SIGKILL in this round.

    Returns:
        The run folder; what server and sites logged is in its file ``log``.
    """
    run, log = file.parent / "runs" / name, file.parent / f"{name}.log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deploy.experiment.trial_process"])
    process = context.Process(target=_work, args=(file, run, log, resume, cold, app), daemon=True)
    process.start()
    if killed_in is not None:
        while process.is_alive() and not any(e["round"] == killed_in for e in events(run, "round_started")):
            time.sleep(0.01)
        process.kill()
        ends = "running"
    process.join(SECONDS)
    hangs = process.is_alive()
    process.kill()
    assert not hangs, f"did not end within {SECONDS:g} seconds; {last_lines(log, 20)}"
    assert read_run(run).get("status") == ends, last_lines(log, 20)
    return run


def expected(folder: Path, sizes: dict[str, int], **changes: object) -> Path:
    """The run folder of a federation to which nothing happens; each is run once in a session.

    Args:
        folder: where, when it was not run yet.
        sizes: see ``make_federation``.
        changes: likewise.
    """
    key = yaml.safe_dump([sizes, changes])
    if key not in _EXPECTED:
        folder.mkdir(parents=True)
        _EXPECTED[key] = in_one_process(make_federation(folder, sizes, **changes))
    return _EXPECTED[key]


def _work(file: Path, run: Path, log: Path, resume: bool, cold: bool, other: App | None) -> None:
    from client import app, received
    from deploy.experiment import simulate

    class Forgetful(simulate.InProcessGrid):
        def __enter__(self) -> Self:
            del os.environ[received.LONG_LIVED], os.environ[app.SESSIONS]
            return self

        def _answer(self, message_id: str, sent: Message) -> Message:
            app._sessions.clear()
            return super()._answer(message_id, sent)

    if other is not None:
        simulate.client_app = other  # type: ignore[assignment]
    if cold:
        simulate.InProcessGrid = Forgetful  # type: ignore[misc]
    die_with_parent()
    with log.open("ab") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    try:
        simulate.simulate(file, run, 1, resume=resume)
    except FedSpanError as error:
        sys.exit(str(error))
