"""The preflight against a real SuperLink over TLS, and against servers that are none."""

import datetime
import os
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest

from client.preflight import check, superlink
from client.preflight.context import CheckContext
from client.superlink.probe import probe
from common.errors import LinkError
from common.system.keys import make_site
from common.system.processes import free_ports
from server.superlink.process import OwnSuperLink, Tls
from tests.client.preflight.test_check import Files, files as files, look, output as output
from tests.harness.certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def address(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the Fleet API of a SuperLink that runs."""
    home = tmp_path_factory.mktemp("superlink")
    tls = Tls(authority.file, home / "server.pem", home / "server.key")
    _, certificate, key = authority.server()
    tls.certificate.write_bytes(certificate)
    tls.key.write_bytes(key)
    (fleet,) = free_ports(1)
    command = OwnSuperLink(home / "socket", f"127.0.0.1:{fleet}", tls, home / "register.json").command(home)
    env = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env["PATH"]])  # where Flower finds its own programs
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        _wait(f"127.0.0.1:{fleet}", authority.file)
        yield f"127.0.0.1:{fleet}"
    finally:
        process.terminate()
        process.wait()


def _wait(address: str, root: Path) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            probe(address, root, 5.0)
            return
        except LinkError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def linked(files: Files, address: str, authority: Authority) -> CheckContext:
    return files.subject(superlink=address, root_certificates=authority.file)


def test_server_is_reached_and_vouched_for(files: Files, address: str, authority: Authority) -> None:
    finding = look("server", linked(files, address, authority))
    assert finding.level == "ok"
    assert f"{address} is CN=a server (127.0.0.1)" in finding.found


def test_key_that_the_server_does_not_know_fails(
    files: Files, address: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "site-a")
    subject = linked(files, address, authority)
    assert look("register", subject).level == "skipped"
    subject.private_key = tmp_path / "site-a.key"
    finding = look("register", subject)
    assert (finding.level, finding.mend) == ("FAIL", "give the operator the .pub file")
    assert "is not in the server's register" in finding.found
    monkeypatch.setattr(superlink, "_ACTIVATE", "/flwr.proto.Fleet/Nothing")
    assert look("register", subject).level == "FAIL"  # an answer that is not understood is none


@pytest.mark.parametrize("off", [0, 3, 8, -200, -400, 7200])
def test_clock_is_compared_with_the_servers(
    address: str, authority: Authority, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As well as the slowest request allows, and the search's last step."""
    right, took = superlink.now, list[float]()

    def timed(request: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(*arguments: Any) -> Any:
            began = time.monotonic()
            try:
                return request(*arguments)
            finally:
                took.append(time.monotonic() - began)

        return stopped

    monkeypatch.setattr(superlink, "now", lambda: right() + datetime.timedelta(seconds=off))
    for name in ("_accepts", "_timed"):
        monkeypatch.setattr(superlink.AnonymousClient, name, timed(getattr(superlink.AnonymousClient, name)))
    with superlink.anonymous_client(address, authority.file, 280.0) as somebody:
        assert somebody.clock_ahead() == pytest.approx(off, abs=max(took) + 0.02)


@pytest.mark.parametrize(
    ("off", "level"), [(0, "ok"), (3, "warning"), (8, "FAIL"), (-200, "warning"), (-400, "FAIL"), (7200, "FAIL")]
)
def test_clock_that_is_off_is_told(
    files: Files, address: str, authority: Authority, off: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink.AnonymousClient, "clock_ahead", lambda _: float(off))
    finding = look("clock", linked(files, address, authority))
    assert finding.level == level
    assert (" behind the server's" if off < 0 else "the server's") in finding.found
    assert level == "ok" or "timedatectl set-ntp true" in finding.mend


def test_server_receives_what_the_upload_is_measured_by(files: Files, address: str, authority: Authority) -> None:
    """All of it, before it answers: else the time until the answer would measure nothing."""
    with forwarding(address) as (through, received):
        subject = linked(files, through, authority)
        finding = look("upload", subject)
        assert finding.level == "ok"
        rate, empty = subject.upload
        assert f"{rate * 8 / 1e6:.1f} Mbit/s up" in finding.found
        assert empty > 0
        with superlink.anonymous_client(through, authority.file, 60.0) as somebody:
            somebody._timed(b"")
            before = received()
            somebody._timed(bytes(1 << 23))
            assert received() - before >= 1 << 23


def test_slow_line_is_a_warning_and_counts_in_a_round(files: Files, address: str, authority: Authority) -> None:
    subject = linked(files, address, authority)
    subject.upload = (1000.0, 0.1)
    finding = look("upload", subject)
    assert (finding.level, "ask the operator" in finding.mend) == ("warning", True)
    files.change("federation", cohort={"round_deadline": 5.0})
    subject = linked(files, address, authority)
    subject.upload = (1000.0, 0.1)
    finding = look("traffic", subject)
    assert (finding.level, "a round may take 5 s" in finding.found) == ("FAIL", True)
    assert "`round_deadline`" in finding.mend
    subject.mbit = 100.0
    assert "at 100.0 Mbit/s (as told)" in look("traffic", subject).found


def test_closed_port_fails_for_everything_that_needs_it_but_is_told_once(files: Files, authority: Authority) -> None:
    subject = linked(files, f"127.0.0.1:{free_ports(1)[0]}", authority)
    checks = {name: check.all_checks()[name] for name in ("server", "clock", "upload")}
    found = dict(check.findings(checks, subject))
    assert found["server"].level == "FAIL"
    assert "refused" in found["server"].found
    assert "ask the operator for address" in found["server"].mend
    assert (found["clock"].level, found["upload"].level) == ("skipped", "skipped")


def test_server_of_another_authority_fails(files: Files, address: str, tmp_path: Path) -> None:
    finding = look("server", linked(files, address, Authority(tmp_path)))
    assert finding.level == "FAIL"
    assert "certificate" in finding.found
    assert "ask the operator" in finding.mend


def test_server_that_is_no_superlink_is_told_so(files: Files, authority: Authority) -> None:
    with serving(authority.server(end=10)) as address:
        subject = linked(files, address, authority)
        finding = look("server", subject)
        assert (finding.level, "expires on" in finding.found) == ("warning", True)
        assert "renew the server's certificate" in finding.mend
        for name in ("clock", "upload"):
            finding = look(name, subject)
            assert finding.level == "FAIL"
            assert "answers 'UNIMPLEMENTED', not as the Fleet API" in finding.found


def test_certificate_for_another_name_fails(files: Files, authority: Authority) -> None:
    with serving(authority.server(address="127.0.0.2")) as address:
        finding = look("server", linked(files, address, authority))
    assert (finding.level, "127.0.0.1" in finding.found) == ("FAIL", True)


def test_expired_certificate_of_a_server_fails(files: Files, authority: Authority) -> None:
    with serving(authority.server(start=-9, end=-2)) as address:
        finding = look("server", linked(files, address, authority))
    assert (finding.level, "expired" in finding.found) == ("FAIL", True)


@contextmanager
def serving(certificates: tuple[bytes, bytes, bytes]) -> Iterator[str]:
    """A gRPC server over TLS that knows no method; its address."""
    _, certificate, key = certificates
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_server_that_says_nothing_fails_at_the_deadline(files: Files, authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        subject = linked(files, f"127.0.0.1:{silent.getsockname()[1]}", authority)
        subject.deadline = 0.5
        finding = look("server", subject)
    assert finding.level == "FAIL"
    assert "timed out" in finding.found


@contextmanager
def forwarding(address: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """A port that passes bytes on to ``address`` and back; and how many went there until now."""
    host, _, port = address.rpartition(":")
    count = 0
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(target: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        threads[-1].start()

    def pump(source: socket.socket, target: socket.socket, up: bool) -> None:
        nonlocal count
        with suppress(OSError):
            while data := source.recv(1 << 16):
                count += len(data) if up else 0
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                start(pump, near, far, True)
                start(pump, far, near, False)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        start(serve)
        yield f"127.0.0.1:{listening.getsockname()[1]}", lambda: count
        listening.shutdown(socket.SHUT_RDWR)
        threads[0].join()
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for thread in threads[1:]:
        thread.join()
    for end in ends:
        end.close()
