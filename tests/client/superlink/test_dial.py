"""The probe takes the way that gRPC takes, through a proxy or around it, and names what keeps it from there."""

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import grpc
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server

from client.superlink.dial import proxy_for
from client.superlink.probe import probe
from common.errors import UnreachableError
from common.system.flower import direct
from common.system.processes import free_ports


@dataclass
class Proxy:
    """One that leads every name to this machine, as only it could, and keeps what it was asked."""

    refusal: bytes = b""
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator["Proxy"]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
            thread = Thread(target=self._serve, args=(listening,))
            thread.start()
            yield self
            listening.shutdown(socket.SHUT_RDWR)
        thread.join()

    def _serve(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                Thread(target=self._answer, args=(listening.accept()[0],)).start()

    def _answer(self, caller: socket.socket) -> None:
        with caller:
            head = b""
            while b"\r\n\r\n" not in head:
                head += caller.recv(4096)
            self.asked.append(head.decode())
            if self.refusal:
                caller.sendall(self.refusal)
                return
            port = int(head.split()[1].rpartition(b":")[2])
            with socket.create_connection(("127.0.0.1", port)) as there:
                caller.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = Thread(target=_copy, args=(there, caller))
                back.start()
                _copy(caller, there)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)
    with Proxy().running() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a gRPC server without TLS."""
    server = grpc.server(ThreadPoolExecutor(2))
    add_HealthServicer_to_server(HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


def grpc_reaches(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            HealthStub(channel).Check(HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return True


PROXY, ELSEWHERE = "http://127.0.0.1:{}", "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("host", "env", "through"),
    [
        ("127.0.0.1", {}, False),
        ("127.0.0.1", {"http_proxy": PROXY}, True),
        ("fl.example", {"https_proxy": PROXY}, True),
        ("fl.example", {"grpc_proxy": PROXY, "https_proxy": ELSEWHERE}, True),
        ("127.0.0.1", {"HTTPS_PROXY": PROXY, "HTTP_PROXY": PROXY}, False),
        ("127.0.0.1", {"https_proxy": "", "http_proxy": PROXY}, False),
        ("127.0.0.1", {"http_proxy": PROXY, "no_proxy": "10.0.0.0/8, 127.0.0.0/8"}, False),
        ("127.0.0.1", {"http_proxy": PROXY, "no_proxy": "10.0.0.0/8"}, True),
        ("127.0.0.1", {"http_proxy": PROXY, "no_proxy": "127.0.0.1", "no_grpc_proxy": "x"}, True),
        ("127.0.0.1", {"http_proxy": PROXY, "NO_PROXY": "127.0.0.1"}, True),
        ("localhost", {"http_proxy": PROXY, "no_proxy": ".example,LocalHost"}, False),
        ("localhost", {"http_proxy": PROXY, "no_proxy": "host"}, True),
        ("localhost", {"http_proxy": PROXY, "no_proxy": ".localhost"}, False),
        ("127.0.0.1", {"http_proxy": "127.0.0.1:{}"}, False),
        ("127.0.0.1", {"http_proxy": "https://127.0.0.1:{}"}, False),
    ],
)
def test_probe_goes_where_grpc_goes(
    host: str, env: dict[str, str], through: bool, proxy: Proxy, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(proxy.port))
    address = f"{host}:{server}"
    assert grpc_reaches(address)
    theirs = [request.splitlines()[0] for request in proxy.asked]
    proxy.asked.clear()
    found = probe(address, None, 5.0)
    assert [request.splitlines()[0] for request in proxy.asked] == theirs
    assert (theirs == [f"CONNECT {address} HTTP/1.1"]) == through
    assert (found.proxy is not None) == through


def test_name_and_password_reach_the_proxy_as_grpc_gives_them(
    proxy: Proxy, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://site:p%40ss@127.0.0.1:{proxy.port}")
    assert grpc_reaches(f"fl.example:{server}")
    probe(f"fl.example:{server}", None, 5.0)
    theirs, ours = ([line for line in told.splitlines() if "Proxy-Auth" in line] for told in proxy.asked)
    assert [line.replace(" ", "") for line in ours] == [line.replace(" ", "") for line in theirs]
    assert "p@ss" not in str(proxy_for("fl.example"))


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "of `https_proxy`: it refuses ('403 Forbidden'); let it allow this host"),
        (b"HTTP/1.1 407 Who\r\n\r\n", "give name and password there: https_proxy=http://NAME:PASSWORD@HOST:PORT"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "it refuses (''); let it allow"),
        (b"what", "it gives no HTTP answer"),
    ],
)
def test_refusal_of_the_proxy_is_told(
    refusal: bytes, says: str, proxy: Proxy, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refusal = refusal
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(UnreachableError) as told:
        probe(f"fl.example:{server}", None, 5.0)
    assert str(told.value).startswith(f"fl.example:{server} through the proxy 127.0.0.1:{proxy.port}")
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "is the SuperLink running?"),
        ({"HTTPS_PROXY": "http://p:3128"}, "gRPC does not read HTTPS_PROXY; for the way through a proxy set `https_"),
        ({"https_proxy": "socks5://p:1"}, "`https_proxy` names no proxy that gRPC can use; allowed: http://HOST:PORT"),
        ({"https_proxy": "http://127.0.0.1:{}"}, "of `https_proxy`: nobody answers (Connection refused); is the proxy"),
    ],
)
def test_way_that_is_closed_names_the_variable(
    env: dict[str, str], says: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nobody,) = free_ports(1)
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(nobody))
    with pytest.raises(UnreachableError) as told:
        probe(f"127.0.0.1:{nobody}", None, 2.0)
    assert says in str(told.value)


def test_what_stays_on_this_machine_goes_around_every_proxy(
    proxy: Proxy, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in direct({"http_proxy": f"http://127.0.0.1:{proxy.port}", "NO_PROXY": "*.lan, 10.1.2.3"}).items():
        monkeypatch.setenv(name, value)
    assert grpc_reaches(f"127.0.0.1:{server}")
    assert grpc_reaches(f"localhost:{server}")
    assert proxy.asked == []
    assert proxy_for("10.1.2.3") is None
    assert proxy_for("fl.example") is not None


def test_socket_of_nobody_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=rf"unix:{tmp_path}/none: nobody answers \(No such file or directory\)"):
        probe(f"unix:{tmp_path}/none", None, 2.0)
