"""What goes wrong at a site reaches the operator, by the site's name and with its reason, and no row with it."""

from pathlib import Path

import yaml

from deploy.sandbox.tiny import make_federation, make_model
from tests.harness.in_one_process import in_one_process
from tests.harness.results import events, outcome, records

SIZES = {"site-a": 9, "site-b": 17}


def edit_site(federation: Path, site: str, **changes: object) -> None:
    file = federation.parent / f"{site}.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def test_site_with_another_base_model_is_refused_by_name_with_both_digests(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, cohort={"join_deadline": 5.0})
    make_model(tmp_path / "other", seed=1)
    edit_site(file, "site-b", model="other")
    told = outcome(in_one_process(file, ends="failed"))
    assert "site-b: its base model differs: digest " in told["reason"]
    assert told["base_digest"] in told["reason"]


def test_site_that_raises_in_training_is_named(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, training={"learning_rate": 1.0e30})
    reason = outcome(in_one_process(file, ends="failed"))["reason"]
    assert "site-a: the numbers of its training overflowed; lower training.learning_rate" in reason
    assert "0 valid updates" in reason or "no update" in reason


def test_site_that_cannot_start_tells_why_though_it_is_not_needed(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, cohort={"min_clients": 1}, rounds=1)
    edit_site(file, "site-b", device="cuda:7")
    (refused,) = events(in_one_process(file), "client_refused")
    assert "site-b: device cuda:7 is asked for" in refused["reason"]


def test_row_that_cannot_be_used_is_named_and_not_quoted(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, cohort={"min_clients": 1}, rounds=1)
    (tmp_path / "site-b.jsonl").write_text('{"term": "a secret", "title": ""}\n')
    run = in_one_process(file)
    (refused,) = events(run, "client_refused")
    assert "site-b: shard" in refused["reason"]
    assert "row 1: column 'title' is empty" in refused["reason"]
    assert "secret" not in refused["reason"]
    assert {record["client"] for record in records(run, "train")} == {"site-a"}
