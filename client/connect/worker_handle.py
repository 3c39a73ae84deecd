"""Start and end the process that does a site's work (``worker_process.py``); used by the supervisor (decision 007)."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.runtime import RuntimeHttpClient

from client.connect.verify import Trust
from client.connect.worker_process import LONG_LIVED, PROGRESS, RuntimeApi

HEARTBEAT_SECONDS = 10.0
log = logging.getLogger("worker")


class WorkerProcess:
    """A child process that answers messages with one app bundle.

    Args:
        bundle: hash of the app bundle that the process is bound to.
        api: the SuperNode's Runtime API, from which the process pulls messages.
        trust: keys and bundles that the site trusts; None: any bundle may run.
        progress: file for what the site does (``client.progress``); None: no file.
        log: file for what libraries print; None: standard error.
    """

    def __init__(
        self, bundle: str, api: RuntimeApi, trust: Trust | None, progress: Path | None = None, log: Path | None = None
    ) -> None:
        self.bundle = bundle
        self._folder = tempfile.mkdtemp(prefix="fedspan-bundle-")  # new, so that nobody has put code there before
        read, write = os.pipe()
        program = str(Path(__file__).resolve().with_name("worker_process.py"))
        command = [sys.executable, "-P", program, "--runtime-api", api.address, "--tell", str(write)]
        command += [] if log is None else ["--log", str(log)]
        self.process = subprocess.Popen(  # noqa: S603 - our own file
            command,
            stdin=subprocess.PIPE,
            pass_fds=[write],
            env={**os.environ, LONG_LIVED: "1"} | ({} if progress is None else {PROGRESS: str(progress)}),
            text=True,
        )
        os.close(write)
        self._told = os.fdopen(read)
        handed = {"folder": self._folder, "trust": asdict(trust) if trust is not None else None}
        self._hand(json.dumps(handed))

    def work(self, token: str) -> Iterator[dict[str, Any]]:
        """Give the process a message's token; yields its reports until the message is answered or the process dies."""
        self._hand(token)  # not on a command line, where others could read it
        for line in self._told:
            told = json.loads(line)
            yield told
            if "done" in told:
                return

    def stop(self) -> None:
        """End the process; only that frees all of its memory on the device."""
        self.process.terminate()
        try:
            self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._told.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hand(self, line: str) -> None:
        assert self.process.stdin is not None  # noqa: S101 - opened above
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()


@contextlib.contextmanager
def heartbeats(connect: Callable[[], RuntimeHttpClient], worker: WorkerProcess) -> Iterator[None]:
    """Send the SuperNode heartbeats for a message; end the worker process when the answer is no longer wanted."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            try:
                with connect() as client:
                    wanted = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except httpx.TransportError:
                continue  # the worker process finds out by itself when it sends its answer
            except httpx.HTTPStatusError:
                wanted = False
            if not wanted and not over.is_set():
                log.warning("the SuperNode does not want the answer any more; the work is stopped")
                worker.process.terminate()
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
