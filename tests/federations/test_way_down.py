"""With a way down of bounded rank a run is resumed bit for bit, and all end with the server's exact model."""

from pathlib import Path

import pytest

from common.protocol.factors import num_bytes
from deploy.sandbox.tiny import make_federation
from server.loop.checkpoint import newest
from tests.federations.test_delivery import digests, keeping
from tests.harness.in_one_process import in_one_process
from tests.harness.results import events, records, same_bits

SIZES = {"site-a": 9, "site-b": 17}
STRATEGY = {"rank": 2, "downlink_rank": 3}  # the mean of both sites has eight directions


def test_killed_run_ends_as_one_in_one_go_and_delivers_all_that_waited(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    wanted = in_one_process(make_federation(tmp_path / "straight", SIZES, strategy=STRATEGY, rounds=3))
    file = keeping(make_federation(tmp_path, SIZES, strategy=STRATEGY, rounds=3))
    run = in_one_process(file, killed_in=3)
    kept = newest(run, pytest.fail)
    assert kept is not None
    assert kept.round == 2
    assert num_bytes(kept.waiting.values()) > 0
    in_one_process(file, resume=True)
    same_bits(run, wanted)
    waiting = [r["diagnostics"]["waiting/model.layers.0"] for r in records(run, "aggregate")]
    assert len(waiting) == 3
    assert all(0.05 < share < 10 for share in waiting)
    last = newest(run, pytest.fail)
    assert last is not None
    assert last.waiting == {}
    assert [(e["client"], e["same"]) for e in events(run, "model_delivered")] == [("site-a", True), ("site-b", True)]
    assert digests(tmp_path / "models-site-a" / "tiny" / "model") == digests(run / "model")


@pytest.mark.long
def test_run_that_stops_early_publishes_what_waits(tmp_path: Path) -> None:
    best = {"patience": 1, "min_change": 100.0}  # nothing is that much better
    file = keeping(make_federation(tmp_path, SIZES, strategy=STRATEGY, rounds=9, best=best))
    run = in_one_process(file)
    last = newest(run, pytest.fail)
    assert last is not None
    assert last.round < 9
    assert last.waiting == {}
    assert [(e["client"], e["same"]) for e in events(run, "model_delivered")] == [("site-a", True), ("site-b", True)]
