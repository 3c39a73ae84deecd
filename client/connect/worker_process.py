"""The process that does a site's work: loads the app's bundle, and answers one message after the other with it.

Only ``client.connect.worker_supervisor`` starts this process, and hands it the tokens of messages. The process verifies
a bundle before it writes or runs any of the bundle (``client.connect.verify``), and unpacks the bundle into a new
folder.

This file must not import FedSpan: the process must run the bundle's code, and modules of an installed FedSpan that are
already imported would be used instead (decision 007).
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from flwr.app import ConfigRecord, Error, Message
from flwr.cli.install import install_from_fab
from flwr.clientapp import ClientApp
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

LONG_LIVED = "FEDSPAN_WORKER"  # tells the app, through its environment, that its process answers many messages
BUNDLE = "FEDSPAN_BUNDLE"  # likewise: SHA-256 of the bundle that it was loaded from
VETTED = "FEDSPAN_VETTED"  # likewise: the site trusts this bundle
DEVICE_BYTES = "FEDSPAN_DEVICE_BYTES"  # CUDA memory of the processes of the site's other devices
HOLDS = "FEDSPAN_HOLDS"  # the app tells through it that this process has keys of a round that goes on
PROGRESS = "FEDSPAN_PROGRESS"  # likewise: file for what the site does
_PATIENCE = 60.0  # seconds that the process tries to reach a SuperNode that does not answer
_CALL_SECONDS = 30.0  # that a call waits for its answer, as in Flower's client
# run by its path: an imported module `common` would hide the bundle's own
_LOGS = str(Path(__file__).resolve().parents[2] / "common" / "system" / "logs.py")
log = logging.getLogger("worker")


@dataclass(frozen=True)
class RuntimeApi:
    """Address of the SuperNode's Runtime API, from which messages are pulled: ``unix:`` and the path of a socket.

    A SuperNode of Flower's own has HOST:PORT, on the loopback interface and so without TLS.
    """

    address: str

    def connect(self, *interceptors: ProtobufClientInterceptor, patience: float = _PATIENCE) -> RuntimeHttpClient:
        """A client of the SuperNode's Runtime API that tries again for ``patience`` seconds."""
        retry = RetryInvoker(lambda: exponential(max_delay=2), httpx.TransportError, max_tries=None, max_time=patience)
        kind, _, path = self.address.partition(":")
        client = RuntimeHttpClient.from_server_address(
            server_address="localhost" if kind == "unix" else self.address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
            retry_invoker=retry,
        )
        if kind == "unix":
            client.close()
            # verify=False: no TLS here, and reading all authorities of the world takes 25 ms
            socket = httpx.HTTPTransport(verify=False, uds=path)
            client._client = httpx.Client(transport=socket, timeout=_CALL_SECONDS)
        return client


def work(api: RuntimeApi, tell: IO[str]) -> None:
    """Answer the messages whose tokens arrive on standard input, one per line, until it is closed."""
    handed, app = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        client = api.connect(RuntimeTokenHttpInterceptor(line.strip()))
        try:
            announcing: Any = _Announcing(client, tell)
            message, context, run, bundle = pull_task_input(announcing)
            try:
                if app is None and (details := _distrust(bundle.content, message, handed["trust"])):
                    log.error("%s", details)
                    reply = Message(Error(ErrorCode.INVALID_FAB, details), reply_to=message)
                else:
                    app = app or _load(bundle.content, run, handed["folder"])
                    reply, details = app(message=message, context=context), ""
            except Exception as error:
                log.exception("the app failed")
                details = f"{type(error).__name__} in the site's worker; the site's log says more"
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=message)
            _tell(tell, answering=True)
            push_message(client, reply, context)
            push_task_output(client, context, SubStatus.FAILED if details else SubStatus.COMPLETED, details)
            del message, reply, context
        except (httpx.HTTPError, ObjectPullError, ObjectPushError) as error:
            # The SuperNode or the run has ended: nobody waits for this answer.
            log.warning("the answer was not taken (%s)", type(error).__name__)
            with contextlib.suppress(httpx.HTTPError):
                push_task_output(client, None, SubStatus.FAILED, "the answer was not taken")
        finally:
            client.close()
        _tell(tell, done=True, memory=_resident(), device=_on_device(), holds=HOLDS in os.environ)


def _distrust(content: bytes, message: Message, trust: dict[str, Any] | None) -> str | None:
    """The reason why the site does not trust a bundle; None when the bundle may run."""
    os.environ[BUNDLE] = hashlib.sha256(content).hexdigest()
    os.environ.pop(VETTED, None)
    if trust is None:
        return None
    file = Path(__file__).with_name("verify.py")  # by its path: a module `client` is the bundle's to bring
    found = importlib.util.spec_from_file_location("fedspan_vetting", file)
    assert found is not None  # noqa: S101 - the file is there
    assert found.loader is not None  # noqa: S101
    sys.modules["fedspan_vetting"] = vetting = importlib.util.module_from_spec(found)
    found.loader.exec_module(vetting)
    config = message.content.get("config") if message.has_content() else None
    signatures = config.get(vetting.RECORD_KEY) if isinstance(config, ConfigRecord) else None
    refusal: str | None = vetting.refusal(content, signatures, vetting.Trust(**trust))
    if refusal is None:
        os.environ[VETTED] = "1"
    return refusal


def _load(content: bytes, run: Run, folder: str) -> ClientApp:
    """Unpack a bundle into ``folder`` and load the app from there; the sender's name for the bundle is ignored."""
    with contextlib.redirect_stdout(io.StringIO()):  # Flower prints progress there, not in our log's format
        path = install_from_fab(content, Path(folder), skip_prompt=True)
    return get_load_client_app_fn("", str(path), multi_app=True)(run.fab_id, run.fab_version, "")


class _Announcing:
    """A client of the Runtime API that reports each message to the supervisor before it pulls the content.

    If this process is killed while it pulls the content, the supervisor knows the message to answer with an error
    (decision 011).
    """

    def __init__(self, client: RuntimeHttpClient, tell: IO[str]) -> None:
        self._client, self._pipe = client, tell

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        """As Flower's."""
        found = self._client.PullMessages(request)
        if found.messages_list:
            _tell(self._pipe, pulled=announced(found))
        return found


def announced(found: PullAppMessagesResponse) -> dict[str, str]:
    """The pulled message without its content (hex), and the message's id, which Flower sends beside the message."""
    return {"message": found.messages_list[0].SerializeToString().hex(), "id": found.message_object_trees[0].object_id}


def _tell(pipe: IO[str], **told: object) -> None:
    pipe.write(json.dumps(told) + "\n")
    pipe.flush()


def _resident() -> int:
    import psutil

    mine, found = psutil.Process(), 0
    for process in (mine, *mine.children()):  # those of the site's other devices
        with contextlib.suppress(psutil.NoSuchProcess):
            found += int(process.memory_info().rss)
    return found


def _on_device() -> int:
    torch = sys.modules.get("torch")
    others = int(os.environ.get(DEVICE_BYTES, "0"))
    if torch is None or not torch.cuda.is_initialized():
        return others
    return others + sum(int(torch.cuda.memory_reserved(device)) for device in range(torch.cuda.device_count()))


def main() -> None:
    """Command line, for ``client.connect.worker_supervisor``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime-api", required=True)
    parser.add_argument("--tell", type=int, required=True)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    logs = runpy.run_path(_LOGS)
    logs["configure"]("worker")
    if options.log is not None:
        logs["set_aside"](options.log)
    with os.fdopen(options.tell, "w") as tell:
        work(RuntimeApi(options.runtime_api), tell)


if __name__ == "__main__":
    main()
