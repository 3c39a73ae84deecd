"""A site's long-lived worker: model, tokenizer, rows and device stay in memory from one message to the next.

Flower alone starts a process for every message, which imports everything and loads the model again; the results are the
same (decision 007). A worker has two processes. The *supervisor* is small, polls the SuperNode for messages and
outlives restarts of the SuperNode. Its child, the *worker process*, loads the app's bundle and does the work. A worker
process is bound to one bundle; for another bundle the supervisor starts a new process. The supervisor ends a worker
process that was idle for a while, which frees the device. If a worker process dies at work, the supervisor answers the
message with an error and starts a new process for the next message.

With a section ``trust`` in the site file, the worker process refuses bundles that are neither listed nor signed with a
listed key, before it writes or runs any of the bundle (``client.connect.verify``).

Only this file, ``client.connect.worker_handle`` and ``client.connect.worker_process`` use Flower's Runtime API.
"""

import contextlib
import json
import logging
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from client.connect.trust import read_trust
from client.connect.verify import Trust
from client.connect.worker_handle import WorkerProcess, heartbeats
from client.connect.worker_process import RuntimeApi, announced
from common.errors import WorkerDied
from common.system.files import write_atomically

_HOLDING = 4 * 3600.0  # seconds that an idle worker with keys of a masked sum waits for the round's other sites
log = logging.getLogger("worker")


@dataclass
class Status:
    """The worker's status, as JSON in the status file.

    Attributes:
        state: "no SuperNode", "idle" or "working".
        messages: number of messages answered so far, also with an error.
        crashes: number of times that a worker process died at work.
        bundle: hash of the app bundle that the worker process is bound to.
        bench: id of the worker process; None: there is none, so nothing is held on the device.
        memory_bytes: resident memory of the worker process and those of its other devices after its last message.
        device_bytes: CUDA memory of the same on all devices.
        last_message: Unix time of the last answer.
    """

    state: str = "no SuperNode"
    messages: int = 0
    crashes: int = 0
    bundle: str | None = None
    bench: int | None = None
    memory_bytes: int = 0
    device_bytes: int = 0
    last_message: float | None = None


@dataclass(frozen=True)
class Options:
    """The command line."""

    api: RuntimeApi
    idle: float
    poll: float
    status: Path | None
    site: Path | None = None
    progress: Path | None = None
    log: Path | None = None


class WorkerSupervisor:
    """Polls for messages and gives them to a worker process, one at a time."""

    def __init__(self, options: Options, trust: Trust | None = None) -> None:
        self._options, self._trust = options, trust
        self._worker: WorkerProcess | None = None
        self._status = Status()
        self._shown, self._holds = True, False  # the status file can be written; keys of a round are in the worker
        self._idle_since = time.monotonic()
        self._client = options.api.connect(patience=0.0)

    def run(self) -> NoReturn:
        """Poll and answer until the process is stopped."""
        self._show("no SuperNode")
        while True:
            asked = time.monotonic()
            task, token = self._acquire()
            if task is not None:
                self._answer(task, token)
                self._idle_since = time.monotonic()
                continue
            self._release_when_idle()
            time.sleep(max(0.0, asked + self._options.poll - time.monotonic()))  # a link of ours has waited, too

    def _release_when_idle(self) -> None:
        """End a worker process that was idle for long; one with keys of a masked sum waits for the round's others."""
        longest = max(self._options.idle, _HOLDING) if self._holds else self._options.idle
        if self._worker is not None and time.monotonic() - self._idle_since > longest:
            log.info("idle for %g seconds: the device is released", longest)
            self.stop()

    def stop(self) -> None:
        """End the worker process, if there is one."""
        if self._worker is not None:
            self._worker.stop()
            self._worker, self._holds = None, False
            self._show(self._status.state)

    def _acquire(self) -> tuple[Task | None, str]:
        try:
            found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.HTTPError as error:
            if self._status.state != "no SuperNode":
                log.warning("no SuperNode at %s (%s); asking on", self._options.api.address, type(error).__name__)
                self._show("no SuperNode")
            return None, ""
        if self._status.state != "idle":
            self._show("idle")
        return (found.task, found.token) if found.HasField("task") and found.token else (None, "")

    def _answer(self, task: Task, token: str) -> None:
        if self._worker is not None and (
            self._worker.bundle != task.fab_hash or self._worker.process.poll() is not None
        ):
            self.stop()
        if self._worker is None:
            files = self._options.progress, self._options.log
            self._worker = WorkerProcess(task.fab_hash, self._options.api, self._trust, *files)
        self._show("working")
        pulled, answering, done = None, False, False
        connect = partial(self._options.api.connect, RuntimeTokenHttpInterceptor(token), patience=5.0)
        with heartbeats(connect, self._worker):
            for told in self._worker.work(token):
                pulled, answering = told.get("pulled", pulled), answering or "answering" in told
                if "done" in told:
                    done = True
                    self._status.memory_bytes, self._status.device_bytes = told["memory"], told["device"]
                    self._holds = told["holds"]
        self._status.messages += 1
        self._status.last_message = time.time()
        if not done:
            code = self._worker.process.wait()
            self._status.crashes += 1
            self.stop()
            reason = f"the site's worker process ended with exit code {code}; its log says more"
            log.error("%s", reason)
            if not answering:  # Flower would take a second answer for the answer to the next message
                self._fail(token, pulled, reason)
        self._show("idle")

    def _fail(self, token: str, pulled: dict[str, str] | None, reason: str) -> None:
        """Answer a message with an error, because the worker process died."""
        client = self._options.api.connect(RuntimeTokenHttpInterceptor(token))
        try:
            if pulled is None:  # the process died before it reported the message
                with contextlib.suppress(httpx.HTTPStatusError):  # or after it had started to pull
                    client.PullTaskInput(PullTaskInputRequest())
                pulled = announced(client.PullMessages(PullAppMessagesRequest()))
            message = message_from_proto(ProtoMessage.FromString(bytes.fromhex(pulled["message"])))
            message.metadata.__dict__["_message_id"] = pulled["id"]
            run, node = message.metadata.run_id, message.metadata.dst_node_id
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, 0
            context = Context(run, node, {}, RecordDict(), {})
            error = Message(Error(WorkerDied.code, reason), reply_to=message)
            push_message(client, error, context)
            push_task_output(client, None, SubStatus.FAILED, reason)
        except Exception:  # the message came over the network: its content may make Flower's code fail in any way
            log.exception("the message could not be answered")
        finally:
            client.close()

    def _show(self, state: str) -> None:
        """Write the status file, atomically; warn once when it cannot be written."""
        self._status.state = state
        self._status.bench = self._worker.process.pid if self._worker is not None else None
        self._status.bundle = self._worker.bundle if self._worker is not None else None
        if self._options.status is not None:
            try:
                write_atomically(self._options.status, json.dumps(asdict(self._status)) + "\n", durable=False)
            except OSError as error:  # e.g. a full disk: the site works on
                if self._shown:
                    log.warning("the status file cannot be written (%s); trying on at every change", error)
                self._shown = False
            else:
                self._shown = True


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def run(options: Options) -> None:
    """Answer messages until the process is asked to end.

    Raises:
        ConfigError: the site file's section ``trust`` is wrong.
    """
    trust = read_trust(options.site) if options.site is not None else None
    if trust is None:
        log.warning("no `trust` in %s: every bundle that the operator sends is run", options.site or "a site file")
    signal.signal(signal.SIGTERM, _stop)
    supervisor = WorkerSupervisor(options, trust)
    try:
        supervisor.run()
    except KeyboardInterrupt:
        return
    finally:
        supervisor.stop()
