"""The best round: who judges it, what is kept of it, and when a run stops early."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType

from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import ConfigError, FederationError
from server.loop.best import decisive
from server.loop.checkpoint import best_state
from server.run.folder import read_lines, read_run
from tests.harness import fake_sites
from tests.harness.fake_sites import NAME, Site, run

SET = {"server": {"path": "s.jsonl", "prompt": "p", "answer": "a"}}


def losses(monkeypatch: pytest.MonkeyPatch, *told: float) -> None:
    """What the server measures after round 0, 1, 2, ..., by the state it is given."""
    known: list[torch.Tensor] = []

    def evaluate(self: object, state: dict[str, torch.Tensor]) -> dict[str, float]:
        number = next((n for n, one in enumerate(known) if torch.equal(one, state[NAME])), len(known))
        if number == len(known):
            known.append(state[NAME].clone())
        return {"loss": told[number], "examples": 4.0}

    monkeypatch.setattr(fake_sites.ServerModel, "evaluate", evaluate)


def happened(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == kind]


def test_best_round_is_kept_beside_the_last_when_its_checkpoint_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_rounds = run(tmp_path / "short", [Site(1), Site(2)], 2)
    losses(monkeypatch, 0.5, 3.0, 1.0, 2.0, 2.5, 1.0)
    final = run(tmp_path, [Site(1), Site(2)], 5, evaluation=SET, checkpoint={"keep": 1})
    folder = tmp_path / "run"
    assert [(e["round"], e["score"]) for e in happened(tmp_path, "best_round")] == [(1, 3.0), (2, 1.0)]
    assert read_run(folder)["best"] == {"round": 2, "metric": "loss", "score": 1.0}
    state, version = best_state(folder, 2)
    assert torch.equal(state[NAME], two_rounds[NAME])
    assert not torch.equal(state[NAME], final[NAME])
    assert version is not None
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best-000002", "round-000005"]


@pytest.mark.parametrize(("patience", "min_change", "last"), [(2, 0.0, 6), (1, 0.4, 3)])
def test_run_stops_when_nothing_gets_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, min_change: float, last: int
) -> None:
    losses(monkeypatch, 9.0, 3.0, 2.8, 2.7, 2.7, 2.7, 2.7, 2.7, 2.7)
    run(
        tmp_path,
        [Site(1), Site(2)],
        8,
        evaluation=SET,
        best={"patience": patience, "min_change": min_change},
    )
    (stopped,) = happened(tmp_path, "stopped_early")
    assert stopped["round"] == last
    times = "1 evaluation" if patience == 1 else f"{patience} evaluations"
    assert re.fullmatch(rf".*loss is not better than after round \d+ \(.*\) for {times}", stopped["reason"])
    assert [e["round"] for e in happened(tmp_path, "round_finished")] == list(range(1, stopped["round"] + 1))
    assert happened(tmp_path, "evaluated")[-1]["round"] == stopped["round"]
    assert read_run(tmp_path / "run")["last_round"] == stopped["round"]


@pytest.mark.parametrize("stopped_in", [2, 3, 4, 5])
def test_resumed_run_finds_the_same_best_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: int
) -> None:
    told, settings = (9.0, 3.0, 1.0, 2.0, 1.5, 1.2), {"evaluation": SET, "checkpoint": {"keep": 1}}
    losses(monkeypatch, *told)
    run(tmp_path / "straight", [Site(1), Site(2)], 5, **settings)
    losses(monkeypatch, *told)
    one, two = Site(1), Site(2)

    def fail(message: Message) -> Message | None:
        failing = two.sent[-1][0] == stopped_in and message.metadata.message_type == MessageType.TRAIN
        return Message(Error(2, "power cut"), reply_to=message) if failing else None

    two.before_reply = fail
    with pytest.raises(FederationError, match="power cut"):
        run(tmp_path, [one, two], 5, **settings)
    losses(monkeypatch, *((9.0, 3.0, 1.0, 2.0, 1.5, 1.2)[stopped_in - 1 :]))
    run(tmp_path, [Site(1), Site(2)], 5, resume=True, **settings)
    assert read_run(tmp_path / "run")["best"] == read_run(tmp_path / "straight" / "run")["best"]
    (state, version), (wanted, its) = (
        best_state(path, 2) for path in (tmp_path / "run", tmp_path / "straight" / "run")
    )
    assert torch.equal(state[NAME], wanted[NAME])
    assert version == its


def test_sites_mean_is_weighted_by_the_rows_that_were_scored() -> None:
    told = {
        "site-a": {"accuracy": 0.5, "examples": 10.0},
        "site-b": {"accuracy": 1.0, "examples": 30.0},
        "site-c": {"accuracy": None, "examples": 99.0},
        "site-d": {},
    }
    assert decisive(told, "accuracy", here=False) == pytest.approx(0.875)
    assert decisive(told | {"server": {"accuracy": 0.1}}, "accuracy", here=True) == 0.1
    assert decisive({"site-d": {}}, "accuracy", here=False) is None


def test_run_that_nobody_can_judge_is_refused_before_its_first_round(tmp_path: Path) -> None:
    site = Site(1)
    site.says = {"held_out_rows": 0}
    with pytest.raises(ConfigError, match=r"`best` goes by loss, but nobody measures it: .* would measure loss"):
        run(tmp_path, [site], 1, best={"patience": 2})
    assert not happened(tmp_path, "round_started")
    run(tmp_path / "unasked", [site], 1)  # a file that asks for no best round has none


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"best": {"metric": "acuracy"}}, "'acuracy' is no score; allowed: loss, perplexity, accuracy"),
        (
            {"best": {"metric": "accuracy"}},
            "`best.metric` is accuracy, which no evaluation measures; allowed: loss, rou",
        ),
        ({"best": {"metric": "rouge_l"}, "evaluation": {"generate": 0}}, "no evaluation measures; allowed: loss$"),
        ({"best": {"patience": 0}}, "`best.patience` is 0"),
    ],
)
def test_metric_that_is_not_measured_is_refused_with_those_that_are(sections: dict[str, Any], reason: str) -> None:
    settings = {"name": "x", "model": {"path": "m"}, "strategy": {"name": "fedftg"}, "rounds": 2}
    settings |= {"training": {"learning_rate": 1e-3, "local_steps": 1}, **sections}
    with pytest.raises(ConfigError, match=reason):
        parse(settings, FederationConfig, "x")
