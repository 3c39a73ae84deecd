"""What goes wrong with the processes of a federation ends it with a reason, and leaves none of them behind."""

import signal
from pathlib import Path

import pytest

from deploy.sandbox.flower import wait_for
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import expected, in_one_process
from tests.harness.processes import SECONDS, Federation, kill, survivors
from tests.harness.results import events, same_bits, trainings

SIZES = {"site-a": 9, "site-b": 17}

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.long
def test_killed_launcher_leaves_no_process_behind_and_a_run_that_goes_on(tmp_path: Path) -> None:
    """RoLoRA's phase follows from the round."""
    changes = {"strategy": {"name": "rolora", "blocks": "lower half", "rank": 2}, "rounds": 4}
    file = make_federation(tmp_path, SIZES, cohort={"round_deadline": 900.0}, **changes)
    with Federation(file) as federation:
        federation.wait_event("round_finished", round=1)
        kill(federation.worker_process("site-b"))  # so that no further round ends while the others notice
        federation.process.kill()
    wait_for(lambda: not survivors(file), SECONDS)
    run = in_one_process(file, "tiny", resume=True)
    (resumed,) = events(run, "resumed")
    assert resumed["round"] >= 1
    assert trainings(run) == [(n, site) for n in range(1, 5) for site in SIZES]
    same_bits(run, expected(tmp_path / "straight", SIZES, **changes))


@pytest.mark.long  # that the same handler takes SIGTERM, tests/processes/test_life.py shows
def test_interrupt_in_the_middle_stops_everything(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES)
    with Federation(file) as federation:
        federation.wait_for(lambda: federation.find("worker_process.py"))
        federation.process.send_signal(signal.SIGINT)
        assert federation.process.wait(60) == 130
    assert survivors(file) == []


@pytest.mark.long
def test_supernode_killed_too_often_ends_the_run_with_its_name(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES)
    with Federation(file, "tiny", "--tries", "0") as federation:
        federation.wait_for(lambda: federation.supernode("site-b"))
        kill(federation.supernode("site-b"))
        assert federation.wait() == 1
        assert "site-b ended 1 times by itself" in federation.log
