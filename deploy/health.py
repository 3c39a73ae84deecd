"""Whether a container is well, for its health check: ``python -m deploy.health superlink|site ...``.

    superlink HOST:PORT --root-certificates ca.crt   does gRPC answer over TLS with a certificate that is good today?
    site status.json [--linked]                      do a site's processes live; and is the server connected?

Exit codes: 0 well, 1 not, with the reason on one line, 2 an argument is wrong.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from common.errors import LaunchError

TIMEOUT = 10.0  # seconds that a SuperLink may take to answer
MAX_AGE = 30.0  # seconds


def check_superlink(address: str, ca: Path, timeout: float = TIMEOUT) -> None:
    """Ask the interface that SuperNodes use for its health, as any SuperNode would: over TLS, by this name.

    Flower has no health service there; that it says so over gRPC is the answer that counts.

    Raises:
        LaunchError: nobody answers, or with a certificate that is expired, of another CA or for another name.
    """
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


def check_site(status: Path, *, linked: bool, max_age: float = MAX_AGE) -> None:
    """Read what ``client.connect.join`` says of a site, twice a second.

    Args:
        status: its status file.
        linked: whether a server must be connected, too.
        max_age: seconds after which what it said counts no more.

    Raises:
        LaunchError: it says nothing, or nothing new, or that its worker or its link is down.
    """
    try:
        told = json.loads(status.read_text(encoding="utf-8"))
        age, link, worker = time.time() - told["time"], told["link"], told["worker"].get("state", "not started")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LaunchError(f"{status} is not there, or is not what client.connect.join writes with --status") from None
    if age > max_age:
        raise LaunchError(f"{status} is {age:.0f} seconds old; allowed: {max_age:g}")
    if worker not in ("idle", "working"):
        raise LaunchError(f"the worker's state is {worker!r}")
    if linked and link != "up":
        raise LaunchError(f"the link to {told.get('superlink')} is {link}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.health", description="Whether a container is well.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    superlink = kinds.add_parser("superlink", help="a SuperLink's interface for SuperNodes")
    superlink.add_argument("address", metavar="HOST:PORT")
    superlink.add_argument("--root-certificates", type=Path, required=True, metavar="FILE")
    superlink.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS")
    site = kinds.add_parser("site", help="a site, by its status file")
    site.add_argument("status", type=Path, metavar="FILE")
    site.add_argument("--linked", action="store_true", help="a server must be connected, too")
    site.add_argument("--max-age", type=float, default=MAX_AGE, metavar="SECONDS")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.kind == "superlink":
            check_superlink(options.address, options.root_certificates, options.timeout)
        else:
            check_site(options.status, linked=options.linked, max_age=options.max_age)
    except LaunchError as error:
        print(f"not well: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
