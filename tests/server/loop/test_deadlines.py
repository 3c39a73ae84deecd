"""When a round closes, and what comes too late."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType

from common.errors import FederationError
from server.run.folder import read_lines
from tests.harness.fake_sites import NAME, Clock, Site, run
from tests.server.loop.test_admission import cohort, events


@pytest.mark.parametrize("norm_ratio", [10.0, None])
def test_order_of_arrival_changes_nothing(tmp_path: Path, norm_ratio: float | None) -> None:
    results = []
    for name, delays in (("a", {1: 0, 2: 1, 3: 2}), ("b", {1: 2, 2: 0, 3: 1})):
        sites = [Site(1), Site(2), Site(3)]
        late = lambda number, message, delays=delays: delays[number]  # noqa: E731
        results.append(run(tmp_path / name, sites, 2, late=late, admission={"norm_ratio": norm_ratio})[NAME])
        order = [e["client"] for e in events(tmp_path / name, "reply")][:3]
        assert order == [f"site-{n}" for n in sorted(delays, key=lambda n: delays[n])]  # type: ignore[index]
    if norm_ratio is not None:
        assert torch.equal(*results)  # they are combined by name
    assert torch.allclose(*results, rtol=0, atol=1e-6)


def test_late_answer_is_dropped_with_a_note_and_the_site_takes_part_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.loop.inflight.POLL_SECONDS", 0.5)
    Clock(monkeypatch)  # so there are four questions until the deadline

    def late(number: int, message: Message) -> int:
        config: Any = message.content["config"]
        trains = message.metadata.message_type == MessageType.TRAIN
        return 4 if number == 2 and trains and config["server-round"] == 1 else 0

    sites = [Site(1), Site(2)]
    final = run(tmp_path, sites, 3, late=late, cohort={"min_clients": 1, "round_deadline": 1.0})
    assert [e["reason"] for e in events(tmp_path, "client_failed")] == ["site-2: no answer within 1 seconds"]
    (note,) = events(tmp_path, "late_reply")
    assert note["reason"].startswith("site-2: its answer to train/1 was seen after ")
    trained = [
        (r["round"], r["client"]) for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"
    ]
    assert sorted(trained) == [(1, "site-1"), (2, "site-1"), (2, "site-2"), (3, "site-1"), (3, "site-2")]
    assert torch.equal(sites[0].weights.tensors[NAME], final[NAME])


def test_reply_that_is_still_being_uploaded_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's grid then blocks the caller."""
    monkeypatch.setattr("server.loop.inflight._PULL_SECONDS", 0.2)
    uploaded = threading.Event()

    class Slow(Site):
        def reply(self, message: Message) -> Message:
            reply = super().reply(message)
            if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "1":
                assert uploaded.wait(280)
            return reply

    slow = Slow(2)
    sites = [Site(1), slow, Site(3)]

    def late(number: int, message: Message) -> int:
        if number == 1 and slow.sent and slow.sent[-1][0] == 3:
            uploaded.set()
        return 0

    run(tmp_path, sites, 4, late=late, cohort={"min_clients": 1, "round_deadline": 1.5})
    assert {e["reason"] for e in events(tmp_path, "client_failed")} == {"site-2: no answer within 1.5 seconds"}
    assert events(tmp_path, "late_reply")
    trained = {r["round"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r.get("client") == "site-3"}
    assert trained >= {1, 2, 3, 4}


def test_missing_sites_are_named_when_the_deadline_ends_the_run(tmp_path: Path) -> None:
    settings = {"cohort": {"min_clients": 2, "round_deadline": 0.6}}
    never = lambda number, message: 10**9 if number == 2 and "active" in message.content["config"] else 0  # noqa: E731
    with pytest.raises(
        FederationError, match=r"round 1: 1 valid updates, 2 needed; site-2: no answer within 0.6 seconds"
    ):
        run(tmp_path, [Site(1), Site(2)], 2, late=never, **settings)


def test_adaptive_deadline_closes_a_round_that_has_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.loop.rounds._LEAST_DEADLINE", 0.5)

    def late(number: int, message: Message) -> int:
        config: Any = message.content["config"]
        trains = message.metadata.message_type == MessageType.TRAIN
        return 10**9 if number == 3 and trains and config["server-round"] == 2 else 0

    clock = Clock(monkeypatch)
    began = clock.now
    settings = {"cohort": cohort(2, round_deadline=100.0, deadline_factor=3.0)}
    run(tmp_path, [Site(1), Site(2), Site(3)], 3, late=late, **settings)
    assert clock.now - began < 50.0
    deadlines = [e["deadline"] for e in events(tmp_path, "round_started")]
    assert deadlines[0] == 100.0
    assert deadlines[1] < 100.0
    assert [e["client"] for e in events(tmp_path, "client_failed")] == ["site-3"]
