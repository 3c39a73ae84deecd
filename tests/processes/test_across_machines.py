"""A federation as on several machines: TLS, registered sites, signed code, and ``fedspan serve`` and ``site join``.

One site joins with a worker that is killed in between; the other has Flower's process for every message.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from common.system import flower
from common.system.processes import ProcessGroup, free_ports
from deploy.cli import main
from deploy.sandbox.flower import wait_for
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import expected
from tests.harness.processes import FEDSPAN, ROOT, SECONDS, environment
from tests.harness.results import events, outcome, records, same_bits

SIZES = {"site-a": 9, "site-b": 17}
STRATEGY = {"name": "fedftg", "blocks": "lower half", "rank": 4}
STRATEGY |= {"subspace": "shared", "wire_precision": "bfloat16", "optimizer_state": "averaged"}
SETTINGS: dict[str, Any] = {"strategy": STRATEGY, "evaluation": {"every": 9, "max_examples": 1, "samples": 0}}

pytestmark = pytest.mark.timeout(1200)


@dataclass
class Ended:
    """A run that has ended.

    Attributes:
        run: its folder.
        status: the last status file of the site whose worker was killed.
        log: that site's; ``code``: with which it ended when it was told to, and ``left`` the processes after that.
    """

    run: Path
    status: dict[str, Any]
    log: str
    code: int
    left: list[str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    folder = tmp_path_factory.mktemp("machines")
    file = make_federation(folder, SIZES, local=None, **SETTINGS)
    signature, register = folder / "bundle.sig", folder / "register.json"
    keys(folder, signature, register)
    (fleet,) = free_ports(1)
    with ProcessGroup(folder / "logs") as group:
        here = Path(os.path.relpath(folder))  # as docs/operators.md names them
        tls = ["--ssl-ca-certfile", str(here / "pki" / "ca.crt"), "--ssl-certfile", str(here / "pki" / "server.pem")]
        tls += ["--ssl-keyfile", str(here / "pki" / "server.key"), "--registry", str(here / register.name)]
        tls += ["--signature", str(here / signature.name)]
        command = [*FEDSPAN, "serve", str(file), "--runs", str(folder / "runs"), *tls]
        command += ["--fleet-api-address", f"127.0.0.1:{fleet}"]
        server = group.start("server", command, environment())
        status = folder / "status.json"
        link = ["--superlink", f"127.0.0.1:{fleet}", "--root-certificates", str(folder / "pki" / "ca.crt")]
        link += ["--poll", "0.5", "--connect-deadline", "600", "--auth-supernode-private-key"]
        join = [*FEDSPAN, "site", "join", str(folder / "site-a.yaml"), *link, str(folder / "site-a.key")]
        member = group.start("site-a", [*join, "--status", str(status)], environment())
        node = [sys.executable, "-P", str(ROOT / "client" / "connect" / "supernode.py"), *link]
        node += [str(folder / "site-b.key"), "--socket", str(folder / "site-b.socket")]
        node += ["--node-config", f'site="{folder}/site-b.yaml"']
        group.start("site-b", node, {**environment(), **flower.environment(folder / "site-b", hub=False)})
        kill_worker(status)
        log = folder / "logs" / "server.log"
        assert server.process.wait(SECONDS) == 0, log.read_text()
        last = json.loads(status.read_text())
        member.process.terminate()
        code, said = member.process.wait(60), (folder / "logs" / "site-a.log").read_text()
        yield Ended(folder / "runs" / "tiny", last, said, code, living(folder / ".site-a"))


def keys(folder: Path, signature: Path, register: Path) -> None:
    """Certificates, a signed bundle, registered sites; site-a trusts the signer alone."""
    for command in (
        ["keys", "ca", folder / "pki"],
        ["keys", "server", folder / "pki"],
        ["code", "key", folder / "reviewer"],
        ["code", "sign", "--key", folder / "reviewer.key", "--out", signature],
        *(["keys", "site", folder / site] for site in SIZES),
        *(["site", "agree", folder / "federation.yaml", "--site", folder / f"{s}.yaml", "--yes"] for s in SIZES),
        *(["sites", "add", register, site, folder / f"{site}.pub"] for site in SIZES),
    ):
        assert main([str(part) for part in command]) == 0
    site = folder / "site-a.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "trust": {"keys": ["reviewer.pub"]}}))


def kill_worker(status: Path) -> None:
    """Once the link is up and the worker is at work."""

    def state() -> dict[str, Any]:
        return dict(json.loads(status.read_text())) if status.exists() else {"worker": {}}

    wait_for(lambda: (s := state()).get("link") == "up" and s["worker"].get("state") == "working", SECONDS, 0.1)
    psutil.Process(state()["worker"]["bench"]).parent().kill()


def living(home: Path) -> list[str]:
    """Command lines of living processes whose Flower files are in ``home``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("FLWR_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def test_run_ends_with_its_report_and_knows_whose_node_is_whose(ended: Ended) -> None:
    assert outcome(ended.run)["status"] == "completed"
    assert (ended.run / "report.html").exists()
    owners = json.loads((ended.run / "nodes.json").read_text()).values()
    assert sorted(owner["site"] for owner in owners) == sorted(SIZES)


def test_warm_worker_process_per_message_and_one_process_have_the_same_result(ended: Ended, tmp_path: Path) -> None:
    """To the last bit, in a shared subspace, with bfloat16 on the wire and moments that are averaged."""
    same_bits(ended.run, expected(tmp_path / "one", SIZES, **SETTINGS))
    assert events(ended.run, "client_failed") == []
    down = {n: {r["bytes"]["down"] for r in records(ended.run, "train") if r["round"] == n} for n in (1, 2)}
    assert down[1] == {0}  # the base model is there
    assert len(down[2]) == 1


def test_killed_worker_is_started_again_and_said_so(ended: Ended) -> None:
    assert ended.status["worker_deaths"] == 1
    assert "worker ended with exit code -9; started again" in ended.log


def test_site_that_leaves_takes_its_processes_along(ended: Ended) -> None:
    assert ended.code == 0
    assert ended.left == []
