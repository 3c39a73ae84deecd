"""Whether a container is well, for its health check: ``fedspan health``. Exit code 0: well, 1: not."""

import argparse
import json
import os
import time
from pathlib import Path

from common.errors import LaunchError
from common.system.command import Command, address, number
from common.system.flower import direct

TIMEOUT = 10.0  # seconds that a SuperLink may take to answer
MAX_AGE = 30.0  # seconds after which what a site said counts no more
_seconds = number(float, 0.1, 86400.0, "seconds")


def check_superlink(address: str, ca: Path, timeout: float = TIMEOUT) -> None:
    """Ask the interface that SuperNodes use for its health, as any SuperNode would: over TLS, by this name.

    Flower has no health service there; that it says so over gRPC is the answer that counts.

    Raises:
        LaunchError: nobody answers, or with a certificate that is expired, of another CA or for another name.
    """
    os.environ.update(direct(os.environ))  # a proxy for the way out would be asked for 127.0.0.1 as well
    import grpc  # type: ignore[import-untyped]
    from grpc_health.v1.health_pb2 import HealthCheckRequest  # type: ignore[import-untyped]
    from grpc_health.v1.health_pb2_grpc import HealthStub  # type: ignore[import-untyped]

    try:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    except OSError as error:
        raise LaunchError(f"{ca} cannot be read: {error.strerror}") from None
    with grpc.secure_channel(address, credentials) as channel:
        try:
            HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise LaunchError(f"{address} does not answer: {' '.join(error.details().split())}") from None


def check_site(status: Path, *, linked: bool) -> None:
    """Read what ``fedspan site join`` says of a site, twice a second.

    Args:
        status: its status file.
        linked: whether a server must be connected, too.

    Raises:
        LaunchError: it says nothing, or nothing new, or that its worker or its link is down.
    """
    try:
        told = json.loads(status.read_text(encoding="utf-8"))
        age, link, worker = time.time() - told["time"], told["link"], told["worker"].get("state", "not started")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LaunchError(f"{status} is not there, or is not what `fedspan site join` writes with --status") from None
    if age > MAX_AGE:
        raise LaunchError(f"{status} is {age:.0f} seconds old; allowed: {MAX_AGE:g}")
    if worker not in ("idle", "working"):
        raise LaunchError(f"the worker's state is {worker!r}")
    if linked and link != "up":
        raise LaunchError(f"the link to {told.get('superlink')} is {link}")


def _superlink_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", type=address, metavar="HOST:PORT", help="its interface for SuperNodes")
    parser.add_argument(
        "--root-certificates", type=Path, required=True, metavar="FILE", help="ca.crt, which signed its certificate"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", help=f"to wait (default: {TIMEOUT:g})"
    )


def _site_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("status", type=Path, metavar="FILE", help="that `fedspan site join --status FILE` writes")
    parser.add_argument("--linked", action="store_true", help="a server must be connected, too")


SUPERLINK = Command(
    _superlink_arguments,
    lambda options: check_superlink(options.address, options.root_certificates, options.timeout),
    example="127.0.0.1:9092 --root-certificates /certs/ca.crt",
    then="fedspan keys show /certs/server.pem, when its certificate is refused",
)
SITE = Command(
    _site_arguments,
    lambda options: check_site(options.status, linked=options.linked),
    example="/var/lib/fedspan/status.json --linked",
    then="the log of `fedspan site join`, which says why it is not well",
)
