"""What a health check says of a SuperLink's interface over real TLS, and of a site's status file."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from common.system.processes import free_ports
from deploy.cli import main
from deploy.keys.certs import make_ca, make_server

GOOD = {"time": 0.0, "superlink": "s:1", "link": "up", "worker": {"state": "idle"}}


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    make_ca(tmp_path / "certs", 10)
    make_server(tmp_path / "certs", ["server"], 10)
    return tmp_path / "certs"


@pytest.fixture
def address(certs: Path) -> Iterator[str]:
    """A gRPC server over TLS that has no health service, like Flower's."""
    server = grpc.server(ThreadPoolExecutor(1))
    pair = ((certs / "server.key").read_bytes(), (certs / "server.pem").read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def superlink(address: str, ca: Path) -> int:
    return main(["health", "superlink", address, "--root-certificates", str(ca), "--timeout", "5"])


def test_superlink_that_answers_over_tls_is_well(certs: Path, address: str) -> None:
    assert superlink(address, certs / "ca.crt") == 0


def test_superlink_with_a_certificate_of_another_authority_is_not_well(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_ca(tmp_path / "other", 10)
    assert superlink(address, tmp_path / "other" / "ca.crt") == 1
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err


def test_nobody_at_the_address_is_not_well(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert superlink(f"127.0.0.1:{port}", certs / "ca.crt") == 1
    assert superlink(f"127.0.0.1:{port}", certs / "missing.crt") == 1
    told = capsys.readouterr().err.splitlines()
    assert f"error: 127.0.0.1:{port} does not answer" in told[0]
    assert told[1].endswith("missing.crt cannot be read: No such file or directory")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"worker": {"state": "working"}}, ""),
        ({"time": -99.0}, "seconds old; allowed: 30"),
        ({"worker": {}}, "the worker's state is 'not started'"),
        ({"worker": {"state": "no SuperNode"}}, "the worker's state is 'no SuperNode'"),
        ({"worker": None}, "is not there, or is not what `fedspan site join` writes"),
        ({"link": "down"}, "the link to s:1 is down"),
    ],
)
def test_site_is_well_while_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], says: str
) -> None:
    told = {**GOOD, **change}
    told["time"] = time.time() + float(str(told["time"]))
    (tmp_path / "status.json").write_text(json.dumps(told))
    assert main(["health", "site", str(tmp_path / "status.json"), "--linked"]) == bool(says)
    assert says in capsys.readouterr().err


def test_site_without_a_server_is_well_unless_it_must_be_linked(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({**GOOD, "time": time.time(), "link": "down"}))
    assert main(["health", "site", str(tmp_path / "status.json")]) == 0
    assert main(["health", "site", str(tmp_path / "status.json"), "--linked"]) == 1
