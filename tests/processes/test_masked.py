"""Masked sums among machines: TLS, registered keys that sign each round's keys, peers compared by hand, kill -9."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.system.processes import ProcessGroup, free_ports
from deploy.cli import main
from deploy.sandbox.flower import wait_for
from deploy.sandbox.tiny import make_federation
from tests.harness.processes import FEDSPAN, SECONDS, environment
from tests.harness.results import events, outcome, records

SIZES = {"site-a": 9, "site-b": 17, "site-c": 13}
SETTINGS: dict[str, Any] = {
    "strategy": {"name": "fedftg", "blocks": "lower half", "rank": 4, "subspace": "shared"},
    "secure_aggregation": {"threshold": 2, "exchange_deadline": 60.0, "tries": 5},
    "cohort": {"min_clients": 2, "join_deadline": 900.0, "round_deadline": 300.0},
    "evaluation": {"every": 9, "max_examples": 1, "samples": 0},
    "rounds": 16,
}

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]


def prepare(folder: Path) -> Path:
    """Keys, register, and agreements in which each site names the other two."""
    file, register = make_federation(folder, SIZES, local=None, **SETTINGS), folder / "register.json"
    commands: list[list[object]] = [["keys", "ca", folder / "pki"], ["keys", "server", folder / "pki"]]
    commands += [["keys", "site", folder / site] for site in SIZES]
    commands += [["sites", "add", register, site, folder / f"{site}.pub"] for site in SIZES]
    for site in SIZES:
        peers = [word for other in SIZES if other != site for word in ("--peer", folder / f"{other}.pub")]
        commands.append(["site", "agree", file, "--site", folder / f"{site}.yaml", "--yes", *peers])
    for command in commands:
        assert main([str(part) for part in command]) == 0
    return file


def state(folder: Path, site: str) -> dict[str, Any]:
    file = folder / f"{site}.status"
    return dict(json.loads(file.read_text())) if file.exists() else {"worker": {}}


def test_sites_killed_between_exchanges_cost_their_update_alone(tmp_path: Path) -> None:
    file, run = prepare(tmp_path), tmp_path / "runs" / "tiny"
    (fleet,) = free_ports(1)
    with ProcessGroup(tmp_path / "logs") as group:
        pki = tmp_path / "pki"
        tls = ["--ssl-ca-certfile", str(pki / "ca.crt"), "--ssl-certfile", str(pki / "server.pem")]
        tls += ["--ssl-keyfile", str(pki / "server.key"), "--registry", str(tmp_path / "register.json")]
        command = [*FEDSPAN, "serve", str(file), "--runs", str(tmp_path / "runs"), *tls]
        server = group.start("server", [*command, "--fleet-api-address", f"127.0.0.1:{fleet}"], environment())
        link = ["--superlink", f"127.0.0.1:{fleet}", "--root-certificates", str(pki / "ca.crt"), "--poll", "0.5"]
        for site in SIZES:
            own = ["--auth-supernode-private-key", str(tmp_path / f"{site}.key"), "--connect-deadline", "600"]
            join = [*FEDSPAN, "site", "join", str(tmp_path / f"{site}.yaml"), *link, *own]
            group.start(site, [*join, "--status", str(tmp_path / f"{site}.status")], environment())

        def all_in() -> int | None:
            """The first round with all three; sites may join one round after the other."""
            found = (r["round"] for r in records(run, "aggregate") if r["diagnostics"]["masked-updates"] == len(SIZES))
            return next(found, None)

        def replied(number: int, site: str) -> bool:
            return server.process.poll() is not None or any(
                (e["round"], e["client"]) == (number, site) for e in events(run, "reply")
            )

        wait_for(lambda: server.process.poll() is not None or all_in() is not None, SECONDS * 2, 0.1)
        first = all_in()
        assert first is not None
        os.kill(state(tmp_path, "site-a")["worker"]["bench"], signal.SIGKILL)  # between any two exchanges of a round
        # its numbers are in the sum: the others unmask it
        wait_for(lambda: replied(first + 2, "site-b"), SECONDS, 0.05)
        psutil.Process(state(tmp_path, "site-b")["worker"]["bench"]).parent().kill()
        log = tmp_path / "logs" / "server.log"
        assert server.process.wait(SECONDS * 2) == 0, log.read_text()
    assert outcome(run)["status"] == "completed"
    told = {r["round"]: r["diagnostics"] for r in records(run, "aggregate")}
    assert sorted(told) == list(range(1, SETTINGS["rounds"] + 1))
    assert all(2 <= d["masked-updates"] <= 3 for d in told.values())
    assert "site-b" in {r["client"] for r in records(run, "train") if r["round"] == first + 2}
    secrets = [(tmp_path / f"{site}.key").read_text().splitlines()[1] for site in SIZES]
    written = [p.read_text(errors="replace") for p in (tmp_path / "logs").iterdir()]
    written += [p.read_text(errors="replace") for p in tmp_path.glob("*-ledger.jsonl")]
    assert not any(secret in text for secret in secrets for text in written)
