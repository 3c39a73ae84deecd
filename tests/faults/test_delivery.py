"""A site that is killed before the end, and comes back, has the model; by registered processes and a true SuperLink."""

from pathlib import Path
from typing import Any

import pytest

from deploy.sandbox.flower import Flower, kill, wait_for
from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import Note
from tests.faults.test_returning_clients import QUIET, SIZES, happened, site, submit
from tests.federations.test_delivery import digests, keeping
from tests.harness.agreements import agree_all
from tests.harness.results import events


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["fedsa-lora", {"name": "fedftg", "rank": 2}], ids=["fedsa-lora", "fedftg"])
def test_site_killed_before_the_end_has_the_model_after_it_returns(
    tmp_path: Path, injected: Note, strategy: object
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "rounds": 1, "training": {"local_steps": 1}}
    settings |= {"cohort": {"min_clients": 2, "round_deadline": 900.0}, "evaluation": {**QUIET, "server": None}}
    file = keeping(make_federation(tmp_path, SIZES, **settings))
    agree_all(file)
    with Flower(tmp_path) as flower:
        flower.start_warm_node("a", site(tmp_path, "site-a"), tmp_path / "a.json")
        first = flower.start_warm_node("b", site(tmp_path, "site-b"), tmp_path / "b.json")
        submit(flower, file)
        wait_for(lambda: happened(tmp_path, event="reply", round=1, client="site-b"), 600)
        for process in first:
            kill(process)
        injected("site killed before the last evaluation")
        wait_for(lambda: happened(tmp_path, event="client_disconnected", client="site-b"), 600)
        flower.start_warm_node("b-again", site(tmp_path, "site-b"), tmp_path / "b-again.json")
        flower.wait(600)
    run = tmp_path / "run"
    assert {(e["client"], e["same"]) for e in events(run, "model_delivered")} == {("site-a", True), ("site-b", True)}
    wanted = digests(run / "model")
    for name in ("site-a", "site-b"):
        folder = tmp_path / f"models-{name}" / "tiny"
        assert digests(folder / "model") == wanted
        assert (folder / "personal").exists() == (strategy == "fedsa-lora")
