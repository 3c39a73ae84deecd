"""Many sites in one process: a Flower grid that hands each message to the ClientApp itself.

Round loop, strategies, ClientApp and messages are the same as in a federation of processes: each message is serialised
and read back by Flower, so that the two sides share no memory. Only the transport is left out (decision 020).
"""

import itertools
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from client.privacy.agreement import agree_for_own_sites
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError
from server.app import federate

_RUN = 1
_POLL_SECONDS = 0.05


def simulate(
    source: Path,
    run_dir: Path,
    threads: int,
    *,
    ledgers: Path | None = None,
    resume: bool = False,
    keep_model: bool = True,
) -> None:
    """Run a federation whose sites, those of ``local.sites``, are in this process.

    Args:
        source: the federation file.
        run_dir: where the results go.
        threads: number of threads that PyTorch may use.
        ledgers: see ``InProcessGrid``.
        resume: resume the run in ``run_dir``.
        keep_model: write the fine-tuned model.

    Raises:
        FedSpanError: with the reason, after it was written to the run folder.
    """
    torch.set_num_threads(threads)
    federation = resolved(load(source, FederationConfig), source.resolve())
    with InProcessGrid(federation, ledgers) as grid:
        federate(grid, source.resolve(), run_dir, resume=resume, flower_run=None, keep_model=keep_model)


class InProcessGrid(Grid):
    """Sites of this process; one thread does their work, one message at a time. Use as a context manager.

    The grid sets the environment variables that the ClientApp reads and never resets them: a process may make one such
    grid in its life.

    Args:
        federation: the federation, with absolute paths; the sites in ``local.sites`` agree to its settings.
        ledgers: an existing folder for the sites' ledgers; None: the paths in the site files.
    """

    def __init__(self, federation: FederationConfig, ledgers: Path | None = None) -> None:
        if federation.local is None:
            raise ConfigError("missing key `local.sites`; a federation in one process needs the site files")
        sites = federation.local.sites
        os.environ["FEDSPAN_WORKER"], os.environ["FEDSPAN_SESSIONS"] = "1", str(len(sites))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, SUPERLINK_NODE_ID, 0
        self._folder = tempfile.TemporaryDirectory(prefix="fedspan-")
        agreements = Path(self._folder.name, "agreements.json")
        names = [load(Path(site), SiteConfig).name for site in sites]
        keys = agree_for_own_sites(agreements, federation, names)
        told = {"agreements": str(agreements)} | ({} if ledgers is None else {"ledgers": str(ledgers)})
        self._contexts = {}
        for number, (site, name) in enumerate(zip(sites, names, strict=True), start=SUPERLINK_NODE_ID + 1):
            own = {"site": site, **told} | ({"identity": str(keys[name])} if name in keys else {})
            self._contexts[number] = Context(_RUN, number, dict(own), RecordDict(), {})
        self._replies: dict[str, Future[Message]] = {}
        self._numbers = itertools.count(1)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sites")

    def __enter__(self) -> "InProcessGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def get_node_ids(self) -> list[int]:
        """All sites, always."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages into the sites' queue; a query (the hello) is answered before this method returns.

        So the server knows every site before it draws a cohort, and two runs draw the same cohorts.
        """
        ids = []
        for message in messages:
            ids.append(f"{next(self._numbers)}")
            self._replies[ids[-1]] = self._worker.submit(self._answer, ids[-1], message)
            if message.metadata.message_type == MessageType.QUERY:
                self._replies[ids[-1]].result()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; each once."""
        done = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self._replies.pop(i).result() for i in done]

    def _answer(self, message_id: str, sent: Message) -> Message:
        proto = message_to_proto(sent)  # only now: one in memory at a time
        proto.metadata.message_id = message_id
        message = message_from_proto(proto)
        try:
            reply = client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001 - answered as flwr-clientapp does
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        return message_from_proto(message_to_proto(reply))

    # Further methods that Flower's own strategies call on a grid

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """See ``Grid.send_and_receive``."""
        left, replies, started = self.push_messages(messages), [], time.monotonic()
        while left and (timeout is None or time.monotonic() < started + timeout):
            replies += self.pull_messages(left)
            left = [i for i in left if i in self._replies]
            time.sleep(_POLL_SECONDS)
        return replies

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See ``Grid.create_message``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """See ``Grid.set_run``; here there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(_RUN)
