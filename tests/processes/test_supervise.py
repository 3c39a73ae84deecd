"""The operator's command on several machines: with a SuperLink of its own over TLS, and with one that runs already."""

import contextlib
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.processes import ProcessGroup, free_ports
from server.supervise import main
from tests.processes.flower_app import Flower
from tests.processes.launcher import ROOT, environment
from tests.tiny import make_federation

SIZES = {"site-a": 9, "site-b": 17}
SETTINGS = {"local": None, "evaluation": {"every": 9, "max_examples": 1, "samples": 0}}


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A certificate authority, and a certificate of it for 127.0.0.1 with its key."""

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def build(subject: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )

    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    usage = x509.KeyUsage(*(True, False, False, False, False, True, True, False, False))
    ca = build("test CA", authority, ca=True).add_extension(usage, critical=True)
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")])
    own = build("server", server, ca=False).add_extension(hosts, critical=False)
    files = folder / "ca.crt", folder / "server.pem", folder / "server.key"
    for file, builder in zip(files, (ca, own), strict=False):
        file.write_bytes(builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


def supervise(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "server.supervise", str(file), "--runs", str(file.parent / "runs"), *options]


def finished(folder: Path, process: "subprocess.Popen[bytes]") -> None:
    log = folder / "logs" / "server.log"
    assert process.wait(200) == 0, log.read_text()
    run = folder / "runs" / "tiny"
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    assert (run / "report.html").exists()


@pytest.mark.timeout(400)
def test_federation_over_tls(tmp_path: Path) -> None:
    """One site joins with a worker that is killed in between, the other with Flower's process for every message."""
    file = make_federation(tmp_path, SIZES, rounds=2, **SETTINGS)
    ca, certificate, key = certificates(tmp_path)
    control, fleet, port = free_ports(3)
    link = ["--superlink", f"127.0.0.1:{fleet}", "--root-certificates", str(ca), "--poll", "0.5"]
    with ProcessGroup(tmp_path / "logs") as group:
        tls = ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
        command = supervise(file, "--port", str(control), "--fleet-api-address", f"127.0.0.1:{fleet}", *tls)
        server = group.start("server", command, environment())
        status = tmp_path / "status.json"
        join = [sys.executable, "-m", "client.join", str(tmp_path / "site-a.yaml"), *link, "--status", str(status)]
        member = group.start("site-a", join, environment())
        node = [sys.executable, "-P", str(ROOT / "client" / "supernode.py"), *link, "--grpc-rere", "--port", str(port)]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"FLWR_HOME": str(tmp_path / "site-b"), "HF_HUB_OFFLINE": "1", "PATH": path}
        group.start("site-b", [*node, "--node-config", f'site="{tmp_path}/site-b.yaml"'], {**environment(), **own})
        kill_worker(status)
        finished(tmp_path, server.process)
        assert json.loads(status.read_text())["worker_deaths"] == 1
        member.process.terminate()
        assert member.process.wait(30) == 0
        assert "worker ended with exit code -9; started again" in (tmp_path / "logs" / "site-a.log").read_text()
        assert not marked_children(tmp_path / ".site-a")


def kill_worker(status: Path) -> None:
    """Once the link is up and the worker is at work."""
    deadline = time.monotonic() + 120
    state: dict[str, Any] = {}
    while state.get("link") != "up" or state["worker"].get("state") != "working":
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
        state = json.loads(status.read_text()) if status.exists() else {}
    bench = psutil.Process(state["worker"]["bench"])
    bench.parent().kill()


def marked_children(home: Path) -> list[str]:
    """Command lines of living processes that work in ``home``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("FLWR_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.long
@pytest.mark.timeout(400)
def test_federation_on_a_superlink_that_runs_already(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, rounds=1, **SETTINGS)
    with Flower(tmp_path) as flower, ProcessGroup(tmp_path / "logs") as group:
        for site in SIZES:
            flower.start_node(site, f'site="{tmp_path / site}.yaml"')
        env = {**environment(), "FLWR_HOME": str(tmp_path / "flwr")}
        finished(tmp_path, group.start("server", supervise(file, "--superlink", "local"), env).process)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, or --insecure, or --superlink"),
        (["--ssl-ca-certfile", "ca", "--ssl-certfile", "c", "--ssl-keyfile", "k"], "ca does not exist"),
        (["--insecure", "--tries", "-1"], "'-1'; allowed: whole numbers from 0"),
        (["--insecure", "--resume"], "holds no run that could go on"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    file = make_federation(tmp_path, SIZES, **SETTINGS)
    capsys.readouterr()
    try:
        code = main([str(file), "--runs", str(tmp_path / "runs"), *options])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
