"""Start, stop and query runs on a SuperLink over its Control API, like Flower's command line."""

import contextlib
import hashlib
import io
import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from common.errors import LaunchError
from common.system.flower import direct
from common.system.flower_socket import call
from server.superlink.process import OwnSuperLink

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

#: Seconds that a call waits for its answer; Flower's own client, which a named connection uses, waits as long.
CALL_SECONDS = 30.0
_FINISHED = "finished"


def start_run(superlink: OwnSuperLink | str, bundle: bytes, config: Mapping[str, str | int]) -> int:
    """Submit an app to a SuperLink; return Flower's number of the run.

    Args:
        superlink: a SuperLink started here, or the name of a connection in Flower's configuration.
        bundle: the app (see ``server.superlink.bundle``).
        config: values for the app's run configuration.

    Raises:
        LaunchError: the SuperLink cannot be reached, or does not take the run.
    """
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
    with control(superlink) as client:
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config)))
        if isinstance(superlink, str):
            request.federation = read_superlink_connection(superlink).federation or ""
        answer = client.StartRun(request)
    if not answer.HasField("run_id"):
        raise LaunchError("the SuperLink did not start the run; its log says more")
    return int(answer.run_id)


def stop_runs(superlink: OwnSuperLink | str, run_dir: Path) -> None:
    """Stop every run that writes to a run folder, also a run whose number is unknown because the SuperLink died.

    Raises:
        LaunchError: the SuperLink cannot be reached, or does not stop one.
    """
    from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest

    with control(superlink) as client:
        for number, run in client.ListRuns(ListRunsRequest()).run_dict.items():
            if run.status.status != _FINISHED and run.override_config["run-dir"].string == str(run_dir):
                client.StopRun(StopRunRequest(run_id=number))


def is_over(superlink: OwnSuperLink | str, run_id: int) -> bool:
    """Whether a run has ended, well or not; one that began before the SuperLink was started again has.

    Raises:
        LaunchError: the SuperLink cannot be reached, or is Flower's own and does not know the run.
    """
    from flwr.proto.control_pb2 import ListRunsRequest

    with control(superlink) as client:
        return bool(client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status.status == _FINISHED)


@contextlib.contextmanager
def control(superlink: OwnSuperLink | str) -> Iterator["ControlHttpClient"]:
    """A client of a SuperLink's Control API.

    Raises:
        LaunchError: there is no such connection, or a call found no SuperLink, had no answer in time, or was refused.
    """
    import click

    who = f"the SuperLink {superlink!r}" if isinstance(superlink, str) else f"the SuperLink at {superlink.socket}"
    try:
        client = _client(superlink)
    except (click.ClickException, ValueError, OSError) as error:
        raise LaunchError(f"{who}: {error}") from None
    try:
        yield client
    except httpx.TimeoutException:
        raise LaunchError(f"{who} did not answer within {CALL_SECONDS:g} seconds") from None
    except httpx.HTTPStatusError as error:
        raise LaunchError(f"{who} refused: {_reason(error.response)}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LaunchError(f"{who} cannot be reached ({error})") from None
    except ValueError as error:  # something else listens there
        raise LaunchError(f"{who} gave no valid answer ({error})") from None
    except SystemExit:  # Flower's client ends the program when the versions do not fit, and has logged which
        raise LaunchError(f"{who} runs another version of Flower") from None
    finally:
        client.close()


def _client(superlink: OwnSuperLink | str) -> "ControlHttpClient":
    from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    if isinstance(superlink, OwnSuperLink):
        tls = superlink.tls
        client = ControlHttpClient(
            f"{'http' if tls is None else 'https'}://127.0.0.1",  # the certificate must be valid for this address
            interceptors=[CliClientHttpInterceptor(), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        verify = tls is not None and ssl.create_default_context(cafile=tls.ca)
        call(client, superlink.socket, verify=verify, timeout=CALL_SECONDS)
        return client
    os.environ.update(direct(os.environ))  # Flower's client heeds a proxy also for an address of this machine
    with contextlib.redirect_stdout(io.StringIO()):  # Flower prints the name of the connection
        return init_http_client_from_connection(read_superlink_connection(superlink))


def _reason(response: httpx.Response) -> str:
    """Why a call was refused, in Flower's words."""
    from flwr.supercore.error import FlowerError

    refusal = FlowerError.from_json(response.text)
    if refusal is None:
        return f"HTTP {response.status_code} {response.reason_phrase}"
    return " ".join(filter(None, (refusal.message, refusal.public_details)))
