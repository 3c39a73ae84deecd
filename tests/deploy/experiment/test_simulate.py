"""Sites in the server's process: the same results as with processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deploy.sandbox.tiny import make_federation
from server.run.folder import read_lines
from tests.harness.launcher import ROOT, environment, launch

RUN = """
import sys, torch
from pathlib import Path
from server.app import federate
from deploy.experiment.simulate import InProcessGrid
torch.set_num_threads(1)
source, run_dir, *sites = map(Path, sys.argv[1:])
with InProcessGrid(sites) as grid:
    federate(grid, source, run_dir, resume=False, flower_run=None)
"""


def in_process(federation: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because a grid changes the environment."""
    local = yaml.safe_load(federation.read_text())["local"]["sites"]
    sites = [str(federation.parent / site) for site in local]
    run_dir = federation.parent / "runs" / "inprocess"
    command = [sys.executable, "-c", RUN, str(federation), str(run_dir), *sites]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def trained(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)


def numbers(run: Path) -> dict[tuple[int, str, str], object]:
    """What was measured, without times and what depends on them."""
    told = {}
    for record in read_lines(run / "metrics.jsonl"):
        kept = {k: v for k, v in record.items() if k in ("bytes", "evaluate")}
        kept |= {k: v for k, v in record.get("train", {}).items() if k in ("loss", "steps", "tokens", "num_examples")}
        told[record["round"], record["client"], record["phase"]] = kept
    return told


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "rolora", "rank": 2, "modules": "linear", "lora_dropout": 0.1},
        pytest.param({"rank": 2}, marks=pytest.mark.long),
    ],
)
def test_result_equals_that_of_a_federation_of_processes(tmp_path: Path, strategy: dict[str, object]) -> None:
    """RoLoRA keeps factors at the site and draws dropout; FedFTG sends steps from the version that a site has."""
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 17}, strategy=strategy)
    for done in (in_process(file), launch(file, timeout=280)):
        assert done.returncode == 0, done.stdout + done.stderr
    apart, together = tmp_path / "runs" / "tiny", tmp_path / "runs" / "inprocess"
    expected, found = trained(apart), trained(together)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert numbers(apart) == numbers(together)


def test_failing_site_is_reported_as_in_a_federation_of_processes(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 17}, rounds=1, cohort={"min_clients": 1})
    (tmp_path / "site-b.jsonl").write_text('{"term": "a secret", "title": ""}\n')
    done = in_process(file)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "inprocess"
    (refused,) = [e for e in read_lines(run / "events.jsonl") if e["event"] == "client_refused"]
    assert "site-b: shard" in refused["reason"]
    assert "row 1: column 'title' is empty" in refused["reason"]
    assert "secret" not in refused["reason"]
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    assert {r["client"] for r in read_lines(run / "metrics.jsonl") if r["phase"] == "train"} == {"site-a"}


def test_process_holds_as_many_sessions_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import Context, RecordDict

    from client import app as client
    from common.config.federation import FederationConfig, SiteConfig, resolved, settings_for_sites
    from common.config.load import load
    from common.protocol.messages import HelloRequest

    file = make_federation(tmp_path, {"site-a": 9, "site-b": 17, "site-c": 9})
    settings = settings_for_sites(resolved(load(file, FederationConfig), file))

    def session(site: str) -> object:
        request = HelloRequest(federation=settings, signatures=None)
        site_file = tmp_path / f"{site}.yaml"
        context = Context(1, 2, {"site": str(site_file)}, RecordDict(), {})
        return client._session(load(site_file, SiteConfig), request, context)

    monkeypatch.setattr(client, "_sessions", {})
    first = session("site-a")
    assert session("site-a") is first
    session("site-b")
    assert session("site-a") is not first  # one at a time
    monkeypatch.setenv(client.SESSIONS, "2")
    a, b = session("site-a"), session("site-b")
    assert (session("site-a"), session("site-b")) == (a, b)
    c = session("site-c")  # the oldest makes room
    assert (session("site-b"), session("site-c")) == (b, c)
    assert session("site-a") is not a
