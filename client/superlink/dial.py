"""Connect to a SuperLink like gRPC does: to a Unix socket, directly, or through a proxy (CONNECT).

gRPC uses the first variable that is set among `grpc_proxy`, `https_proxy` and `http_proxy`, in lower case only. It
connects directly to hosts that `no_grpc_proxy`, or else `no_proxy`, lists: by name, by the end of the name, or by
subnet.
"""

import base64
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from common.errors import UnreachableError

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_LONGEST_ANSWER = 1 << 16  # bytes of a proxy's answer


@dataclass(frozen=True)
class Proxy:
    """The proxy of the environment.

    Attributes:
        variable: the environment variable that names the proxy.
        host: the proxy's host.
        port: the proxy's port.
        credentials: the proxy's user name and password, or empty.
    """

    variable: str
    host: str
    port: int
    credentials: str

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port} of `{self.variable}`"


def socket_path(address: str) -> Path | None:
    """The path in ``unix:PATH``; None for other addresses."""
    kind, _, path = address.partition(":")
    return Path(path) if kind == "unix" and path.startswith("/") else None


def proxy_for(host: str, env: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy through which gRPC reaches a host; None: gRPC connects directly."""
    variable = _variable(env)
    url = _usable(env[variable]) if variable is not None else None
    if variable is None or url is None or _excepted(host, env.get("no_grpc_proxy", env.get("no_proxy", ""))):
        return None
    user, _, _ = url.netloc.rpartition("@")
    return Proxy(variable, str(url.hostname), url.port or 443, unquote(user))


def dial(host: str, port: int, timeout: float) -> socket.socket:
    """Open a connection, with ``timeout`` seconds for every step.

    Raises:
        UnreachableError: nobody answers at the address, or the proxy refuses the connection.
    """
    proxy = proxy_for(host)
    if proxy is None:
        return _connect(host, port, timeout, f"{host}:{port}", f"is the SuperLink running?{_hint(os.environ)}")
    at = f"{host}:{port} through {proxy}"
    connection = _connect(proxy.host, proxy.port, timeout, at, "is the proxy right?")
    try:
        _ask(connection, host, port, proxy)
    except UnreachableError:
        connection.close()
        raise
    except OSError as error:
        connection.close()
        raise UnreachableError(f"{at}: the proxy does not answer ({said(error)})") from None
    return connection


def dial_socket(path: Path, timeout: float) -> socket.socket:
    """Open a connection to a Unix socket.

    Raises:
        UnreachableError: nobody answers on the socket, or this account may not open it.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise UnreachableError(f"unix:{path}: nobody answers ({said(error)})") from None
    return connection


def said(error: OSError) -> str:
    """A short text for an error."""
    return str(error.strerror or error or type(error).__name__)


def _connect(host: str, port: int, timeout: float, at: str, mend: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout)
    except socket.gaierror as error:
        raise UnreachableError(f"{at}: no machine of the name {host} is known ({error.strerror}); {mend}") from None
    except OSError as error:
        raise UnreachableError(f"{at}: nobody answers ({said(error)}); {mend}") from None


def _ask(connection: socket.socket, host: str, port: int, proxy: Proxy) -> None:
    """Ask the proxy to connect to the host.

    Raises:
        UnreachableError: the proxy refuses.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if proxy.credentials:
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(proxy.credentials.encode()).decode()}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = connection.recv(4096)
        answer += more
        if not more or len(answer) > _LONGEST_ANSWER:
            raise UnreachableError(f"{where} through {proxy}: it gives no HTTP answer")
    status = answer.split(b"\r\n", 1)[0].decode("ascii", "replace").partition(" ")[2]
    if status.startswith("407"):
        mend = f"give name and password there: {proxy.variable}=http://NAME:PASSWORD@HOST:PORT"
    else:
        mend = "let it allow this host and port, or name the host in `no_proxy` if there is a way around it"
    if not status.startswith("2"):
        raise UnreachableError(f"{where} through {proxy}: it refuses ({status[:60]!r}); {mend}")


def _variable(env: Mapping[str, str]) -> str | None:
    """The variable that gRPC reads; None: none is set, or the first one is empty, which disables the others."""
    first = next((name for name in _VARIABLES if name in env), None)
    return first if first is not None and env[first] else None


def _usable(value: str) -> SplitResult | None:
    """A proxy's URL; None when gRPC would not take it."""
    try:
        url = urlsplit(value)
        usable = url.scheme == "http" and bool(url.hostname) and url.port != 0
    except ValueError:
        return None
    return url if usable else None


def _excepted(host: str, entries: str) -> bool:
    for entry in filter(None, (entry.strip().lower() for entry in entries.split(","))):
        if f".{host.lower()}".endswith(f".{entry.removeprefix('.')}"):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:  # a name in place of an address, or of a subnet
            continue
    return False


def _hint(env: Mapping[str, str]) -> str:
    """A hint about a proxy variable that gRPC ignores, with the reason; empty when there is none."""
    variable = _variable(env)
    if variable is not None:
        if _usable(env[variable]) is None:
            return f" (`{variable}` names no proxy that gRPC can use; allowed: http://HOST:PORT)"
        return ""
    large = next((name.upper() for name in _VARIABLES if env.get(name.upper())), None)
    if large is None:
        return ""
    return f" (gRPC does not read {large}; for the way through a proxy set `https_proxy`, in small letters)"
