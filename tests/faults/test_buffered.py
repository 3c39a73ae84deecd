"""Rounds that wait for no slow site, in a true federation: a site that stands still, and a server that dies."""

import signal
from pathlib import Path

import pytest

from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import QUIET, Note
from tests.harness.processes import Federation, kill
from tests.harness.results import records, trainings

SIZES = {"site-a": 9, "site-b": 17, "site-c": 12}
SHARED = {"name": "fedftg", "blocks": "lower half", "rank": 4, "subspace": "shared", "scale": 1.0}


def buffered(tmp_path: Path, rounds: int, max_age: int) -> Path:
    cohort = {"min_clients": 2, "mode": "buffered", "size": 2, "max_age": max_age, "round_deadline": 300.0}
    cohort["join_deadline"] = 400.0
    return make_federation(tmp_path, SIZES, strategy=SHARED, rounds=rounds, evaluation=QUIET, cohort=cohort)


def given(federation: Federation, site: str) -> bool:
    """Whether a site was given work of round 1."""
    started = [e for e in federation.events() if e["event"] in ("round_started", "work_given") and e["round"] == 1]
    return any(site in (*e.get("clients", ()), e.get("client")) for e in started)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("max_age", [12, 1])
def test_site_that_stands_still_holds_nobody_up_and_its_old_update_counts_or_is_dropped(
    tmp_path: Path, injected: Note, max_age: int
) -> None:
    with Federation(buffered(tmp_path, 12, max_age)) as federation:
        federation.wait_for(lambda: given(federation, "site-c") and federation.works("site-c"))
        (worker,) = federation.worker_process("site-c")
        worker.send_signal(signal.SIGSTOP)
        federation.wait_event("round_finished", round=4)
        worker.send_signal(signal.SIGCONT)
        injected("slow site", 1, "the others go on; its update counts by its age, or is dropped")
        assert federation.wait() == 0, federation.log
    events = federation.events()
    assert not [e for e in events if e["event"] in ("client_failed", "update_refused", "late_reply")]
    first = next(e for e in events if e["event"] in ("reply", "update_dropped") and e["client"] == "site-c")
    assert first["round"] > 4
    assert first["age"] == first["round"] - 1
    assert first["event"] == ("reply" if max_age == 12 else "update_dropped")
    assert any(e.get("age", 0) <= 1 for e in events if e["event"] == "reply" and e["client"] == "site-c")
    assert sorted({number for number, _ in trainings(federation.run)}) == [*range(1, 13)]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_server_that_dies_gives_new_work_to_the_slow_site_too(tmp_path: Path, injected: Note) -> None:
    with Federation(buffered(tmp_path, 8, 12)) as federation:
        federation.wait_for(lambda: given(federation, "site-c") and federation.works("site-c"))
        (worker,) = federation.worker_process("site-c")
        worker.send_signal(signal.SIGSTOP)
        federation.wait_event("round_started", round=3)
        assert kill(federation.server())
        worker.send_signal(signal.SIGCONT)
        injected("kill -9 of the server beside a slow site", 1, "all sites are given new work, no round counts twice")
        assert federation.wait() == 0, federation.log
    events = federation.events()
    (resumed,) = [e for e in events if e["event"] == "resumed"]
    again = events[events.index(resumed) :]
    begun = next(e for e in again if e["event"] == "round_started")
    assert begun["round"] == resumed["round"] + 1
    found = [e for e in again if e["event"] == "reply"]
    assert all(e["round"] - e.get("age", 0) > resumed["round"] for e in found)
    assert any(e["client"] == "site-c" for e in found)
    assert [r["round"] for r in records(federation.run, "aggregate")] == [*range(1, 9)]
