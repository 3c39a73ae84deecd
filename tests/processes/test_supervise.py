"""The operator's command on several machines: with a SuperLink of its own over TLS, and with one that runs already."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from common.system.processes import ProcessGroup, free_ports
from deploy.cli import main
from deploy.sandbox.flower import Flower
from deploy.sandbox.tiny import make_federation
from tests.harness.launcher import FEDSPAN, ROOT, environment
from tests.harness.sample_run import completed

SIZES = {"site-a": 9, "site-b": 17}
SETTINGS = {"local": None, "evaluation": {"every": 9, "max_examples": 1, "samples": 0}}


def supervise(file: Path, *options: str) -> list[str]:
    return [*FEDSPAN, "serve", str(file), "--runs", str(file.parent / "runs"), *options]


def finished(folder: Path, process: "subprocess.Popen[bytes]") -> None:
    log = folder / "logs" / "server.log"
    assert process.wait(200) == 0, log.read_text()
    run = folder / "runs" / "tiny"
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    assert (run / "report.html").exists()


@pytest.mark.timeout(400)
def test_federation_over_tls_with_registered_sites_and_signed_code(tmp_path: Path) -> None:
    """One site joins with a worker that is killed in between, the other with Flower's process for every message."""
    file = make_federation(tmp_path, SIZES, rounds=2, **SETTINGS)
    pki, register, signature = tmp_path / "pki", tmp_path / "register.json", tmp_path / "bundle.sig"
    assert main(["keys", "ca", str(pki)]) == main(["keys", "server", str(pki)]) == 0
    assert main(["code", "key", str(tmp_path / "reviewer")]) == 0
    assert main(["code", "sign", "--key", str(tmp_path / "reviewer.key"), "--out", str(signature)]) == 0
    for site in SIZES:
        assert main(["keys", "site", str(tmp_path / site)]) == 0
        assert main(["sites", "add", str(register), site, str(tmp_path / f"{site}.pub")]) == 0
    trusting = tmp_path / "site-a.yaml"
    trusting.write_text(yaml.safe_dump({**yaml.safe_load(trusting.read_text()), "trust": {"keys": ["reviewer.pub"]}}))
    (fleet,) = free_ports(1)
    with ProcessGroup(tmp_path / "logs") as group:
        here = Path(os.path.relpath(tmp_path))  # as the README's operator names them
        tls = ["--ssl-ca-certfile", str(here / "pki" / "ca.crt"), "--ssl-certfile", str(here / "pki" / "server.pem")]
        tls += ["--ssl-keyfile", str(here / "pki" / "server.key"), "--registry", str(here / register.name)]
        tls += ["--signature", str(here / signature.name)]
        command = supervise(file, "--fleet-api-address", f"127.0.0.1:{fleet}", *tls)
        server = group.start("server", command, environment())
        status = tmp_path / "status.json"
        link = ["--superlink", f"127.0.0.1:{fleet}", "--root-certificates", str(pki / "ca.crt"), "--poll", "0.5"]
        link += ["--connect-deadline", "180", "--auth-supernode-private-key"]
        join = [*FEDSPAN, "site", "join", str(trusting), *link, str(tmp_path / "site-a.key")]
        member = group.start("site-a", [*join, "--status", str(status)], environment())
        program = str(ROOT / "client" / "connect" / "supernode.py")
        node = [sys.executable, "-P", program, *link, str(tmp_path / "site-b.key")]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"FLWR_HOME": str(tmp_path / "site-b"), "HF_HUB_OFFLINE": "1", "PATH": path}
        node += ["--socket", str(tmp_path / "site-b.socket"), "--node-config", f'site="{tmp_path}/site-b.yaml"']
        group.start("site-b", node, {**environment(), **own})
        kill_worker(status)
        finished(tmp_path, server.process)
        assert json.loads(status.read_text())["worker_deaths"] == 1
        member.process.terminate()
        assert member.process.wait(30) == 0
        assert "worker ended with exit code -9; started again" in (tmp_path / "logs" / "site-a.log").read_text()
        assert not marked_children(tmp_path / ".site-a")
    owners = json.loads((tmp_path / "runs" / "tiny" / "nodes.json").read_text()).values()
    assert sorted(owner["site"] for owner in owners) == sorted(SIZES)


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
        (["--insecure", "--registry", "register.json"], "--registry needs a SuperLink of its own with TLS"),
        (["--insecure", "--signature", "none.sig"], "none.sig: cannot be read (No such file or directory)"),
        (["--insecure", "--tries", "-1"], "'-1'; allowed: whole numbers, 0 and more"),
        (["--insecure", "--resume"], "holds no run that could go on"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    file = make_federation(tmp_path, SIZES, **SETTINGS)
    capsys.readouterr()
    assert main(["serve", str(file), "--runs", str(tmp_path / "runs"), *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_service_manager_may_start_a_run_again_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_federation(tmp_path, SIZES, **SETTINGS)
    run = completed(tmp_path / "runs" / "tiny")
    again = ["serve", str(file), "--runs", str(tmp_path / "runs"), "--insecure"]
    assert main([*again, "--resume-if-begun"]) == 0
    assert "the run has ended well" in capsys.readouterr().out
    assert "<html" in (run / "report.html").read_text()  # its supervisor had died before it wrote one
    assert main(again) == 2
    assert "already holds a run" in capsys.readouterr().err
