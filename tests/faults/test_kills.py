"""SIGKILL to every process of a federation, before, during and after training and aggregation."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import QUIET, SIZES, Note
from tests.harness.processes import Federation, kill
from tests.harness.results import same_result, trainings

FEDFTG = {"name": "fedftg", "blocks": "lower half", "rank": 4, "update_proj_gap": 2, "scale": 1.0}
ROLORA = {"name": "rolora", "blocks": "lower half", "rank": 2}
Moment = Callable[[Federation, int], None]


def begins(federation: Federation, number: int) -> None:
    federation.wait_event("round_started", round=number)


def trains(federation: Federation, number: int) -> None:
    begins(federation, number)
    federation.wait_for(lambda: federation.works("site-a") or replied(federation, number))


def replied(federation: Federation, number: int) -> bool:
    return any(e["event"] == "reply" and e["round"] == number for e in federation.events())


def combines(federation: Federation, number: int) -> None:
    """One reply is in; the other one, and the combination, come within moments."""
    begins(federation, number)
    federation.wait_for(lambda: replied(federation, number))
    time.sleep(random.random())


def saves(federation: Federation, number: int) -> None:
    """The round is over, its checkpoint is about to be written."""
    federation.wait_event("round_finished", round=number)


MOMENTS: dict[str, Moment] = {
    "as a round begins": begins,
    "in training": trains,
    "in aggregation": combines,
    "at a checkpoint": saves,
}
VICTIMS: dict[str, Callable[[Federation], list[psutil.Process]]] = {
    "server": lambda f: f.server(),
    "SuperLink": lambda f: f.superlink(),
    "SuperNode": lambda f: f.supernode("site-a"),
    "supervisor of a worker": lambda f: f.worker_supervisor("site-a"),
    "worker": lambda f: f.worker_process("site-a"),
}


def run_with_kills(
    tmp_path: Path, strategy: object, rounds: int, plan: list[tuple[str, str]], injected: Note, straight: Path
) -> None:
    """Kills, each in a round of its own; the result must be the one without them."""
    file = make_federation(tmp_path, SIZES, strategy=strategy, rounds=rounds, evaluation=QUIET)
    with Federation(file, "tiny", "--tries", "20") as federation:
        number = 0
        for victim, moment in plan:  # one a round, though rounds go on meanwhile: work that is lost twice fails
            number += 1
            assert number <= rounds, "the run was over before all kills"
            MOMENTS[moment](federation, number)
            time.sleep(random.random())
            count = kill(VICTIMS[victim](federation))
            number = max(e["round"] for e in federation.events() if e["event"] == "round_started")
            if count:  # it may be on its way up again
                injected(f"kill -9 of the {victim} {moment}", count)
        code = federation.wait(600)
    assert code == 0, federation.log
    same_result(federation.run, straight, tmp_path)
    assert trainings(federation.run) == trainings(straight)


@pytest.mark.timeout(600)
def test_server_and_superlink_that_are_killed_change_nothing(
    tmp_path: Path, injected: Note, straight: Callable[..., Path]
) -> None:
    plan = [("server", "in training"), ("SuperLink", "in training")]
    strategy = {**ROLORA, "modules": "linear", "lora_dropout": 0.1}  # which is drawn anew in every round
    run_with_kills(tmp_path, strategy, 5, plan, injected, straight(strategy, 5))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("victim", "times", "strategy"),
    [
        ("server", 8, FEDFTG),
        ("SuperLink", 6, ROLORA),
        ("SuperNode", 3, FEDFTG),
        ("supervisor of a worker", 4, ROLORA),
        ("worker", 12, FEDFTG),
    ],
    ids=list(VICTIMS),
)
def test_killed_at_any_moment(
    tmp_path: Path,
    injected: Note,
    straight: Callable[..., Path],
    victim: str,
    times: int,
    strategy: dict[str, object],
) -> None:
    random.seed(victim)
    plan = [(victim, list(MOMENTS)[n % len(MOMENTS)]) for n in range(times)]
    rounds = 4 * times
    run_with_kills(tmp_path, strategy, rounds, plan, injected, straight(strategy, rounds))
