"""A federation of a private site and one with a limit; and one that no site may take part in."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from client.privacy.ledger import verify
from common.accountant import epsilon
from deploy.sandbox.tiny import make_federation
from server.report.write import render
from server.run.read import read_all
from tests.harness.in_one_process import in_one_process
from tests.harness.results import Record, events, lines, outcome, records

PRIVATE = {"clip": 0.01, "noise_multiplier": 1.0, "delta": 1e-5, "max_epsilon": 100.0}


def change(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **sections}))


def ledger(run: Path, site: str) -> list[Record]:
    path = run.parents[1] / f"{site}-ledger.jsonl"
    entries = lines(path)
    assert verify(path).lines == len(entries)
    return entries


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ends in round 2, for which it needs both sites."""
    folder = tmp_path_factory.mktemp("policy")
    file = make_federation(folder, {"private": 13, "limited": 17}, admission={"max_noise": 0.01})
    change(folder / "private.yaml", privacy=PRIVATE)
    change(folder / "limited.yaml", policy={"max_rounds": 1, "share_metrics": False})
    run = in_one_process(file, ends="failed")
    reason = "round 2: 1 valid updates, 2 needed; limited: this site's policy: `max_rounds` is 1"
    assert reason in outcome(run)["reason"]
    return run


def test_site_at_its_limit_refuses_with_a_reason_on_both_sides(run: Path) -> None:
    (refused,) = events(run, "client_failed")
    assert (refused["round"], refused["client"]) == (2, "limited")
    assert [(e["event"], e.get("message"), e.get("round")) for e in ledger(run, "limited")] == [
        ("begun", None, None),
        ("sent", "hello", None),
        ("charged", "train", 1),
        ("sent", "train", 1),
        ("refused", "train", 2),
    ]
    log = (run.parents[1] / "together.log").read_text()
    assert len([line for line in log.splitlines() if " site: " in line and "`max_rounds` is 1" in line]) == 1


def test_private_site_sends_noise_and_nothing_else_that_knows_its_rows(run: Path) -> None:
    (trained,) = [r for r in records(run, "train") if r["client"] == "private"]
    assert sorted(trained["train"]) == ["learning_rate", "num_examples", "steps"]
    assert {r["client"] for r in records(run, "evaluate")} == {"server"}
    sent = [e for e in ledger(run, "private") if e["event"] == "sent" and e["message"] == "train"]
    assert [e["round"] for e in sent] == [1, 2]  # the second left too, and counts, though the round failed
    assert [e["privacy"]["epsilon_total"] for e in sent] == pytest.approx([epsilon(4.0, 1e-5), epsilon(8.0, 1e-5)])
    entries = sent[0]["out"]["bytes"] / 4  # whole weights, with noise on every number
    assert all(0.8 < e["update_norm"] / (0.01 * entries**0.5) < 1.2 for e in sent)


def test_operator_sees_who_adds_noise(run: Path) -> None:
    joined = {event["client"]: event for event in events(run, "client_joined")}
    assert joined["private"]["privacy"] == {"clip": 0.01, "noise": 0.01, "delta": 1e-5, "max_epsilon": 100.0}
    assert joined["limited"]["privacy"] is None
    assert [joined[site]["held_out"] for site in joined] == [0, 0]
    assert "clip 0.01, noise 0.01, stops at" in render(read_all(run))


def test_site_whose_noise_or_policy_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    file = make_federation(tmp_path, {"noisy": 9, "elsewhere": 13}, rounds=1, cohort={"join_deadline": 5.0})
    change(tmp_path / "noisy.yaml", privacy=PRIVATE)
    change(tmp_path / "elsewhere.yaml", policy={"federations": ["another"]})
    said = outcome(in_one_process(file, ends="failed"))["reason"]
    assert "noisy: it adds noise of standard deviation 0.01 to every number" in said
    assert "allowed by `admission.max_noise`: 0" in said
    assert "elsewhere: this site's policy: `federations` allows another; this is tiny" in said
    assert verify(tmp_path / "elsewhere-ledger.jsonl").lines == 2
