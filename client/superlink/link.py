"""The link of a site to its SuperLink: Flower's SuperNode, with workarounds for Flower 1.39 (decisions 011, 025).

Before Flower starts, the files and the connection to the SuperLink are tried (``client.superlink.probe``). While the
SuperLink does not answer, or does not admit this site, the link tries again until the deadline. An error that will not
go away ends the program with one line; Flower 1.39 prints a traceback, tries for ever, or exits with code 0.

``client.superlink.turns`` has the other differences to Flower 1.39, but for one: the Runtime API is a Unix socket, so
that no other account of this machine can answer in the site's name (``common.system.flower_socket``).
"""

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.config import parse_config_args
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.retry import RetryInvoker
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

from client.superlink.probe import probe
from client.superlink.turns import Turns
from client.watch.link_state import LinkState
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError, FedSpanError, LinkError, UnreachableError
from common.system import flower_socket, logs
from common.system.files import keep_private
from common.system.keys import fingerprint, read_private

_PROBE_SECONDS = 10.0
_AGAIN_SECONDS = 2.0
_make_retry_invoker = start_client_internal._make_fleet_connection_retry_invoker


class Link:
    """A site's connection to the SuperLink: waits for it, and judges its errors.

    Args:
        address: HOST:PORT of the Fleet API.
        root_certificates: the federation's CA; None: without TLS.
        key: fingerprint of the site's key; None: the site has no key.
        patience: seconds to wait for a SuperLink that does not answer, or does not admit the site.
        state: is told what becomes of the link.
    """

    def __init__(
        self, address: str, root_certificates: Path | None, key: str | None, patience: float, state: LinkState
    ) -> None:
        self._address, self._root_certificates, self._key = address, root_certificates, key
        self._patience, self._deadline, self._state = patience, time.monotonic() + patience, state

    def wait(self) -> None:
        """Wait until the SuperLink answers and its certificate is right.

        Raises:
            FedSpanError: the SuperLink cannot be trusted, or has not answered in time.
        """
        while True:
            try:
                probe(self._address, self._root_certificates, _PROBE_SECONDS)
                return
            except UnreachableError as error:
                self._try_on(str(error))
                time.sleep(_AGAIN_SECONDS)

    def judge(self, error: grpc.RpcError) -> bool | None:
        """Decide about an error of the SuperLink: False: try again; None: Flower decides; a final error ends here."""
        code, details = error.code(), str(error.details() or "")
        if code == grpc.StatusCode.UNAUTHENTICATED:
            _end(LinkError(self._unwelcome(details)))
        told = FlowerError.from_json(details)
        if told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            who = f"the key {self._key}" if self._key else "this site"
            why = "not in its register, revoked or expired there, or in use by a SuperNode that is still connected"
            mend = "give the operator the .pub file"
            self._try_on(f"{self._address} does not let {who} in: {why}; {mend}", refused=True)
            return False
        if told is not None and told.code == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED:
            _end(LinkError(f"{self._address} wants a registered key: give --auth-supernode-private-key"))
        # cancelled by the SuperLink, which was stopped
        if code == grpc.StatusCode.CANCELLED and "Channel closed" not in details:
            return False
        if code == grpc.StatusCode.UNAVAILABLE and "handshake" in details.lower():
            try:
                probe(self._address, self._root_certificates, _PROBE_SECONDS)
            except UnreachableError:
                return False
            except FedSpanError as reason:
                _end(reason)
        return None

    def _unwelcome(self, details: str) -> str:
        if "timestamp" in details:
            clock = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            return (
                f"{self._address}: this machine's clock says {clock}, which is not the server's time; set it right "
                "(it may be 5 seconds ahead and 5 minutes behind)"
            )
        if self._key is None:
            return f"{self._address} does not know this site any more; it was started with a new database"
        return f"{self._address} has shut the key {self._key} out: it was revoked, or has expired; ask the operator"

    def _try_on(self, reason: str, *, refused: bool = False) -> None:
        """Note that the link tries again; after ``patience`` seconds end the program if refused, or raise."""
        if time.monotonic() >= self._deadline:
            error = LinkError(f"{reason} (tried for {self._patience:g} seconds)")
            if refused:
                _end(error)
            raise error
        self._state.down(reason, refused=refused, patience=self._patience)

    def retry_invoker(self, *arguments: Any, **options: Any) -> RetryInvoker:  # noqa: ANN401 - as Flower's own
        """Flower's ``_make_fleet_connection_retry_invoker``, which asks ``judge`` first."""
        invoker = _make_retry_invoker(*arguments, **options)
        flowers = invoker.should_giveup
        assert flowers is not None  # noqa: S101 - Flower sets it

        def give_up(error: Exception) -> bool:
            judged = self.judge(error) if isinstance(error, grpc.RpcError) else None
            final = flowers(error) if judged is None else judged
            if not final and isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE:
                self._state.down(f"{self._address} does not answer any more")
            return final

        invoker.should_giveup = give_up
        return invoker


def _end(error: FedSpanError) -> NoReturn:
    """End the process at once, from any thread; Flower would end with exit code 0."""
    print(f"error: {error}", file=logs.own(), flush=True)
    os._exit(1)


def _key(file: Path | None) -> str | None:
    """Fingerprint of the site's key."""
    if file is None:
        return None
    key = read_private(file.expanduser())
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file}: not an ECDSA key; make one with: fedspan keys site PREFIX")
    return fingerprint(key.public_key())


def _check_isolation(node_config: str | None, isolation: str) -> None:
    """Refuse isolation "subprocess" at a site with ``trust``: Flower would run bundles without checking them."""
    config = parse_config_args([node_config]) if node_config else {}
    file = Path(str(config.get("site", "")))
    if isolation == "subprocess" and file.is_file() and load(file, SiteConfig).trust is not None:
        raise ConfigError(
            f"{file}: `trust` is kept by the worker alone; start this with --isolation process, and beside it "
            f"fedspan site worker --site {file}"
        )


def run(options: argparse.Namespace) -> NoReturn:
    """Try the link, then be ``flower-supernode`` until the process is ended.

    Raises:
        FedSpanError: a file is wrong, or the SuperLink does not let this site in.
    """
    _check_isolation(options.node_config, options.isolation)
    key = _key(options.auth_supernode_private_key)
    if key is not None and options.insecure:
        raise ConfigError("--auth-supernode-private-key needs TLS: give --root-certificates in place of --insecure")
    ca = None if options.insecure else options.root_certificates.expanduser()
    state = LinkState(options.superlink, options.status)
    link = Link(options.superlink, ca, key, options.connect_deadline, state)
    link.wait()
    sys.argv = ["flower-supernode", *_flowers(options)]
    keep_private()
    flower_socket.serve("flower-supernode", options.socket)
    start_client_internal._make_fleet_connection_retry_invoker = link.retry_invoker
    Turns(state, options.poll).install()
    try:
        flower_supernode()
    except SystemExit as end:  # os._exit: a thread that still tries to reach the SuperLink would keep the process alive
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    # Flower's loop has ended by an error. Its Runtime API would keep this process alive, and the worker waiting.
    where = "the lines above say" if options.log is None else f"{options.log} says"
    _end(LinkError(f"the link to {options.superlink} ended; {where} why"))


def _flowers(options: argparse.Namespace) -> list[str]:
    """Flower's command line: the options that both programs have, and the options that only Flower has."""
    shared = ("superlink", "root_certificates", "auth_supernode_private_key", "node_config", "isolation")
    given = [f"--{name.replace('_', '-')}={value}" for name in shared if (value := getattr(options, name)) is not None]
    return [*given, *(["--insecure"] if options.insecure else []), *options.rest]
