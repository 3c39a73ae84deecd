"""Try the connection to the SuperLink before Flower does: one clear reason instead of endless attempts."""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from client.superlink.dial import Proxy, dial, dial_socket, proxy_for, said, socket_path
from common.errors import ConfigError, LinkError, UnreachableError
from common.system.keys import host_names, read_certificates

_NOT_YET, _EXPIRED, _HOST_NAMES = 9, 10, (62, 64)  # OpenSSL's X509_V_ERR_...
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # with empty settings, as gRPC begins
_SETTINGS = 4  # type of the frame with which a gRPC server answers


@dataclass(frozen=True)
class LinkReport:
    """Findings at a SuperLink's address.

    Attributes:
        host: the host as given.
        port: the Fleet API's port.
        subject: subject of the server's certificate; None without TLS, like the next three.
        names: DNS names and IP addresses in the certificate.
        not_before: start of the certificate's validity.
        not_after: end of the certificate's validity.
        round_trip: seconds that it took to connect.
        proxy: the proxy of the connection; None: direct.
    """

    host: str
    port: int
    subject: str | None
    names: list[str]
    not_before: datetime | None
    not_after: datetime | None
    round_trip: float
    proxy: Proxy | None = None


def probe(address: str, root_certificates: Path | None, timeout: float) -> LinkReport:
    """Connect to a SuperLink as gRPC would and look at its certificate; sends nothing of the site.

    Args:
        address: HOST:PORT of the Fleet API, or ``unix:`` and the path of a socket of this machine.
        root_certificates: the federation's CA; None: without TLS.
        timeout: seconds for every step.

    Raises:
        ConfigError: the address or the file with the CA is wrong.
        UnreachableError: nobody answers at the address.
        LinkError: the server cannot be trusted, or speaks another protocol; the text has the reason and the remedy.
    """
    path = socket_path(address)
    if path is not None:
        started = time.monotonic()
        with dial_socket(path, timeout) as raw:
            if not _greets(raw):
                raise UnreachableError(f"{address}: what answers there is no SuperLink's Fleet API (no gRPC)")
        return LinkReport(address, 0, None, [], None, None, time.monotonic() - started)
    host, port = split(address)
    authorities = [] if root_certificates is None else _authorities(root_certificates)
    with _connected(host, port, timeout) as (raw, seconds):
        if root_certificates is None:
            _check_plain(raw, host, port, timeout)
            return LinkReport(host, port, None, [], None, None, seconds, proxy_for(host))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as gRPC
        context.set_alpn_protocols(["h2"])
        context.load_verify_locations(root_certificates)
        try:
            with context.wrap_socket(raw, server_hostname=host) as secure:
                found = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
        except ssl.SSLCertVerificationError as error:
            server = _certificate(host, port, timeout)
            reason = _distrust(error.verify_code, f"{host}:{port}", host, server, root_certificates, authorities)
            raise LinkError(reason or f"{host}:{port}: {error.verify_message}") from None
        except OSError as error:
            if _is_plain(host, port, timeout):
                raise LinkError(
                    f"{host}:{port} speaks no TLS, so nobody can tell who it is; the operator's SuperLink must be "
                    "started with its certificate (only on one machine for trials: --insecure here too)"
                ) from None
            raise UnreachableError(f"{host}:{port}: the TLS handshake failed ({said(error)})") from None
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    subject, names = found.subject.rfc4514_string(), host_names(found)
    return LinkReport(host, port, subject, names, begins, ends, seconds, proxy_for(host))


def split(address: str) -> tuple[str, int]:
    """Host and port of a SuperLink's address.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"--superlink {address!r}; allowed: HOST:PORT, as fl.example.org:9092 or [::1]:9092")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _authorities(file: Path) -> list[x509.Certificate]:
    found = read_certificates(file)
    ends = max(authority.not_valid_after_utc for authority in found)
    if ends < datetime.now(UTC):
        raise LinkError(f"{file}: the CA expired on {_minute(ends)}; ask the operator for the new ca.crt")
    return found


@contextlib.contextmanager
def _connected(host: str, port: int, timeout: float) -> Iterator[tuple[socket.socket, float]]:
    """A connection, and the seconds it took."""
    started = time.monotonic()
    with dial(host, port, timeout) as raw:
        yield raw, time.monotonic() - started


def _check_plain(raw: socket.socket, host: str, port: int, timeout: float) -> None:
    if _greets(raw):
        return
    try:
        _certificate(host, port, timeout)
    except (LinkError, OSError):
        raise UnreachableError(f"{host}:{port}: what answers there is no SuperLink's Fleet API (no gRPC)") from None
    raise LinkError(
        f"{host}:{port} speaks TLS; leave out --insecure and give --root-certificates, the operator's ca.crt"
    )


def _is_plain(host: str, port: int, timeout: float) -> bool:
    try:
        with _connected(host, port, timeout) as (raw, _):
            return _greets(raw)
    except LinkError:
        return False


def _greets(raw: socket.socket) -> bool:
    """Whether a gRPC server without TLS answers."""
    try:
        raw.sendall(_PREFACE)
        begin = raw.recv(9)
    except OSError:
        return False
    return len(begin) >= 4 and begin[3] == _SETTINGS and begin[:1] == b"\x00"


def _certificate(host: str, port: int, timeout: float) -> x509.Certificate:
    """The server's certificate, without checking it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with _connected(host, port, timeout) as (raw, _), context.wrap_socket(raw, server_hostname=host) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")


def _distrust(
    code: int, at: str, host: str, server: x509.Certificate, file: Path, authorities: list[x509.Certificate]
) -> str | None:
    """Why the server's certificate is rejected, and the remedy; None: only OpenSSL's own message explains it."""
    begins, ends, now = server.not_valid_before_utc, server.not_valid_after_utc, datetime.now(UTC)
    clock = f"this machine's clock says {_minute(now)}"
    if code in _HOST_NAMES:
        names = ", ".join(host_names(server)) or "no name at all"
        mend = f"use one of these with --superlink, or ask the operator for a certificate with --host {host}"
        return f"{at}: the server's certificate is not for {host} but for {names}; {mend}"
    if code == _EXPIRED:
        return f"{at}: the server's certificate expired on {_minute(ends)}, {clock}; ask the operator to renew it"
    if code == _NOT_YET:
        return f"{at}: the server's certificate is valid from {_minute(begins)} only, {clock}; set the clock right"
    if not any(server.issuer == authority.subject and _signed(server, authority) for authority in authorities):
        ours = "; ".join(authority.subject.rfc4514_string() for authority in authorities)
        theirs = f"the server's certificate is signed by {server.issuer.rfc4514_string()}"
        return f"{at}: {theirs}, {file} is {ours}; ask the operator for the right ca.crt"
    return None


def _signed(server: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        server.verify_directly_issued_by(authority)
    except Exception:  # noqa: BLE001 - cryptography raises several kinds; all mean no
        return False
    return True


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
