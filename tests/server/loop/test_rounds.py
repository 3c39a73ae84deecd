"""The round loop against sites that answer at once: who is sent what, and who is asked again."""

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType
from flwr.common.constant import ErrorCode

from common.errors import DataError, DivergedError, FederationError, StaleStateError, WorkerDied
from server.loop import pending_updates as spool
from server.run.folder import read_lines
from strategies.flower.strategy import FlowerStrategy
from strategies.rule import Update
from tests.harness.fake_sites import NAME, Site, run


def test_sites_are_sent_what_they_lack_and_end_where_the_server_ends(tmp_path: Path) -> None:
    sites = [Site(1), Site(2)]
    final = run(tmp_path, sites, 3)
    for site in sites:
        assert site.sent == [(1, []), (2, [1]), (3, [2]), (3, [3])]  # the last is the evaluation
        assert torch.equal(site.weights.tensors[NAME], final[NAME])
    down = [r["bytes"]["down"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"]
    assert down[:2] == [0, 0]
    assert len(set(down[2:])) == 1


@pytest.mark.parametrize("norm_ratio", [10.0, None])
def test_nothing_of_an_update_is_left_when_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm_ratio: float | None
) -> None:
    """Neither of those that arrive, nor of those that come back from the disk."""
    watched: list[weakref.ref[Update]] = []
    left: list[int] = []

    def watching(original: Any) -> Any:
        def read(*args: Any) -> Update:
            left.append(sum(ref() is not None for ref in watched))
            update: Update = original(*args)
            watched.append(weakref.ref(update))
            return update

        return read

    monkeypatch.setattr(FlowerStrategy, "admit", watching(FlowerStrategy.admit))
    monkeypatch.setattr(spool, "_loaded", watching(spool._loaded))
    run(tmp_path, [Site(number) for number in range(1, 6)], 1, admission={"norm_ratio": norm_ratio})
    assert left == [0] * (5 if norm_ratio is None else 10)


@pytest.mark.parametrize("optimizer", ["fedavgm", {"method": "fedadam", "learning_rate": 0.1}])
def test_server_optimizer_goes_on_where_it_stopped(tmp_path: Path, optimizer: object) -> None:
    straight = run(tmp_path / "straight", [Site(1), Site(2)], 4, server_optimizer=optimizer)
    plain = run(tmp_path / "plain", [Site(1), Site(2)], 4)
    assert not torch.allclose(straight[NAME], plain[NAME])
    one, two = Site(1), Site(2)

    def fail(message: Message) -> Message | None:
        return Message(Error(2, "power cut"), reply_to=message) if two.sent[-1][0] == 3 else None

    two.before_reply = fail
    with pytest.raises(FederationError, match=r"round 3: .*power cut"):
        run(tmp_path, [one, two], 4, server_optimizer=optimizer)
    sites = [Site(1), Site(2)]
    resumed = run(tmp_path, sites, 4, resume=True, server_optimizer=optimizer)
    assert torch.equal(resumed[NAME], straight[NAME])
    for site in sites:  # whole weights go down
        assert site.sent == [(3, []), (4, []), (4, [])]
        assert torch.equal(site.weights.tensors[NAME], resumed[NAME])


def test_site_that_has_lost_its_weights_is_sent_the_steps_from_the_base_model_in_the_same_round(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)

    def lose_once(message: Message) -> None:
        if [number for number, _ in two.sent] == [1, 2, 3]:  # just asked for round 3
            two.forget()

    two.before_reply = lose_once  # type: ignore[assignment]
    final = run(tmp_path, [one, two], 4)
    assert two.sent == [(1, []), (2, [1]), (3, [2]), (3, [1, 2]), (4, [3]), (4, [4])]
    assert torch.equal(two.weights.tensors[NAME], final[NAME])
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert not [e for e in events if e["event"] in ("client_failed", "update_refused")]
    assert final[NAME].equal(run(tmp_path / "again", [Site(1), Site(2)], 4)[NAME])  # as if nothing had happened


def test_site_that_fails_for_another_reason_is_not_asked_again(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)
    two.before_reply = lambda message: Message(Error(2, "out of memory"), reply_to=message)
    with pytest.raises(FederationError, match="round 1: 1 valid updates, 2 needed; site-2: out of memory"):
        run(tmp_path, [one, two], 1)
    assert two.sent == [(1, [])]


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (DivergedError.code, "DivergedError", "site-2: loss is nan"),
        (DataError.code, "DataError", "site-2: loss is nan"),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "CLIENT_APP_RAISED_EXCEPTION", "site-2: loss is nan"),
        (4711, "WireError", "site-2: its error has code 4711; allowed: 0, 1, .*, 1000, 1001, .*"),
    ],
)
def test_failure_is_known_by_its_code(tmp_path: Path, code: int, kind: str, reason: str) -> None:
    """In the run's events, and behind its own error."""
    one, two = Site(1), Site(2)
    two.before_reply = lambda message: Message(Error(code, "loss is nan"), reply_to=message)
    with pytest.raises(FederationError, match=reason) as caught:
        run(tmp_path, [one, two], 1)
    assert caught.value.causes == {"site-2": kind}
    (failed,) = [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == "client_failed"]
    assert failed["kind"] == kind
    assert re.fullmatch(reason, failed["reason"])


def test_site_whose_worker_died_is_asked_once_more_from_the_base_model(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)

    def die_once(message: Message) -> Message | None:
        if [number for number, _ in two.sent] != [1, 2]:
            return None
        two.forget()
        return Message(Error(WorkerDied.code, "the worker's process ended"), reply_to=message)

    two.before_reply = die_once
    final = run(tmp_path, [one, two], 3)
    assert two.sent == [(1, []), (2, [1]), (2, [1]), (3, [2]), (3, [3])]
    assert final[NAME].equal(run(tmp_path / "again", [Site(1), Site(2)], 3)[NAME])


def test_site_that_is_stale_twice_is_left_out_with_its_reason(tmp_path: Path) -> None:
    one, two = Site(1), Site(2)
    two.before_reply = lambda message: Message(Error(StaleStateError.code, "nothing is here"), reply_to=message)
    with pytest.raises(FederationError, match="site-2: nothing is here"):
        run(tmp_path, [one, two], 1)
    assert two.sent == [(1, []), (1, [])]


def numbers(tmp_path: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.mark.parametrize("stopped_in", [1, 2, 4])
def test_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path: Path, stopped_in: int) -> None:
    straight = run(tmp_path / "straight", [Site(1), Site(2)], 4)
    one, two = Site(1), Site(2)

    def fail(message: Message) -> Message | None:
        failing = two.sent[-1][0] == stopped_in and message.metadata.message_type == MessageType.TRAIN
        return Message(Error(2, "power cut"), reply_to=message) if failing else None

    two.before_reply = fail
    with pytest.raises(FederationError, match=f"round {stopped_in}: .*power cut"):
        run(tmp_path, [one, two], 4)
    assert [r["round"] for r in numbers(tmp_path) if r["phase"] == "aggregate"] == list(range(1, stopped_in))
    # The sites are new processes in a new run: they hold the base model, and nothing else.
    again = [Site(1), Site(2)]
    resumed = run(tmp_path, again, 4, resume=True)
    assert torch.equal(resumed[NAME], straight[NAME])
    assert again[0].sent[0] == (stopped_in, list(range(1, stopped_in)))
    by_round = sorted(numbers(tmp_path), key=str), sorted(numbers(tmp_path / "straight"), key=str)
    for records in by_round:  # bytes differ where a site had to be sent more
        for record in records:
            record.pop("bytes", None)
    assert by_round[0] == by_round[1]
