"""A SuperLink that cannot be used is told in one line, whatever is wrong with it."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from flwr.proto.control_pb2 import StartRunRequest, StartRunResponse

from common.errors import LaunchError
from server.superlink import control
from server.superlink.process import OwnSuperLink

REFUSAL = b'{"code": 15, "detail": "Invalid run configuration.", "extra": "no such key"}'


class OnSocket(ThreadingHTTPServer):
    """An HTTP server on a Unix socket."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Without looking for a host's name."""
        self.socket.bind(self.server_address)  # type: ignore[arg-type]

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:  # type: ignore[override]
        """A caller has no address."""
        return self.socket.accept()[0], ("", 0)


@contextmanager
def server(
    status: int | None, body: bytes = b"", hold: Event | None = None, at: Path | None = None
) -> Iterator[tuple[int, list[bytes]]]:
    """An HTTP server with one answer (None: it hangs up), its port if it has one, and what it was sent."""
    sent: list[bytes] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.rfile.read(int(self.headers["content-length"])))
            if hold is not None:
                hold.wait(10)
            if status is not None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) if at is None else OnSocket(str(at), Answer) as listening:  # type: ignore[arg-type]
        thread = Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield 0 if at is not None else listening.server_port, sent
        finally:
            if hold is not None:
                hold.set()
            listening.shutdown()
            thread.join()


def start(superlink: OwnSuperLink | str) -> int:
    return control.start_run(superlink, b"app", {"federation": "f.yaml", "resume": True})


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (412, REFUSAL, "refused: Invalid run configuration. no such key"),
        (502, b"<html>", "refused: HTTP 502 Bad Gateway"),
        (200, b"<html>", "gave no valid answer"),
        (200, b"", "did not start the run"),
        (None, b"", "cannot be reached (Server disconnected"),
    ],
)
def test_answer_that_is_no_run_is_told(tmp_path: Path, status: int | None, body: bytes, says: str) -> None:
    with server(status, body, at=tmp_path / "s"), pytest.raises(LaunchError) as told:
        start(OwnSuperLink(tmp_path / "s", ""))
    assert str(told.value).startswith("the SuperLink ")
    assert says in str(told.value)


def test_silence_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CALL_SECONDS", 0.2)
    with (
        server(None, hold=Event(), at=tmp_path / "s"),
        pytest.raises(LaunchError, match=rf"{tmp_path}/s did not answer within 0.2 seconds"),
    ):
        start(OwnSuperLink(tmp_path / "s", ""))


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # httpcore's
def test_nobody_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=rf"{tmp_path}/s cannot be reached \(.*No such file"):
        start(OwnSuperLink(tmp_path / "s", ""))


def test_other_version_is_no_end_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.interceptors.http import runtime_version

    monkeypatch.setattr(runtime_version, "get_runtime_version_incompatibility_exit_message", lambda _: "too new")
    monkeypatch.setattr(runtime_version, "flwr_exit", lambda *_: sys.exit(1))  # Flower's own kills in a thread as well
    with server(412, REFUSAL, at=tmp_path / "s"), pytest.raises(LaunchError, match="runs another version of Flower"):
        start(OwnSuperLink(tmp_path / "s", ""))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flower's folder, with its configuration of connections."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path / "config.toml"


def test_named_connection_is_used_as_flower_uses_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(200, StartRunResponse(run_id=7).SerializeToString()) as (port, sent):
        told = f'address = "127.0.0.1:{port}"\ninsecure = true\nfederation = "@we/all"'
        home.write_text(f"[superlink.ours]\n{told}\n")
        assert start("ours") == 7
    request = StartRunRequest.FromString(sent[0])
    assert (request.federation, request.fab.content) == ("@we/all", b"app")
    assert request.override_config["resume"].bool is True
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("connection", "says"),
    [
        ('address = "127.0.0.1:1"\ninsecure = true', "cannot be reached"),
        ('address = "not an address"\ninsecure = true', "cannot be reached"),
        ('address = "127.0.0.1:1"\nroot-certificates = "none.crt"', "none.crt"),
        ("insecure = 3", "insecure"),
    ],
)
def test_wrong_connection_is_told(home: Path, connection: str, says: str) -> None:
    home.write_text(f"[superlink.ours]\n{connection}\n")
    with pytest.raises(LaunchError, match=rf"^the SuperLink 'ours'.*{says}"):
        start("ours")


def test_unknown_connection_is_told(home: Path) -> None:
    home.write_text('[superlink.ours]\naddress = "127.0.0.1:1"\ninsecure = true\n')
    with pytest.raises(LaunchError, match=r"^the SuperLink 'theirs'.*not found in the Flower configuration file"):
        start("theirs")
