"""No site takes a round over: not by errors, not by what only the SuperLink may say, not by the rows it declares."""

from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from common.errors import DataError, PolicyError, WorkerDied
from common.protocol import wire
from server.run.folder import read_lines
from server.run.state import read_state
from tests.attacks.hostile import LEFT, THREE, Hostile, events, honest, says
from tests.harness.fake_sites import NAME, Site, base, node_unavailable, run

SUPERLINKS = [ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE]


@pytest.mark.parametrize("code", SUPERLINKS)
def test_site_that_speaks_for_the_superlink_is_not_believed_and_left_out(tmp_path: Path, code: int) -> None:
    site = Hostile(4, says(code, "gone for ever"))
    run(tmp_path, [*honest(), site], 5, **THREE)
    failed = events(tmp_path, "client_failed")
    assert [(e["round"], e["kind"]) for e in failed] == [(1, "WireError"), (2, "WireError"), (3, "WireError")]
    assert "which only the SuperLink may say" in failed[0]["reason"]
    assert [number for number, _ in site.sent] == [1, 2, 3]  # once a round
    assert [e["client"] for e in events(tmp_path, "client_excluded")] == ["site-4"]


@pytest.mark.parametrize("code", SUPERLINKS)
def test_hello_that_speaks_for_the_superlink_is_asked_once(tmp_path: Path, code: int) -> None:
    run(tmp_path, [*honest(), Hostile(4, says(code, "gone"), MessageType.QUERY)], 1, **THREE)
    (refused,) = events(tmp_path, "client_refused")
    assert (refused["client"], refused["kind"]) == ("node 4", "WireError")


@pytest.mark.parametrize(
    ("code", "sent"), [(DataError.code, 1), (PolicyError.code, 1), (WorkerDied.code, 2), (4711, 1), (0, 1)]
)
def test_site_that_answers_errors_for_ever_is_left_out(tmp_path: Path, code: int, sent: int) -> None:
    """As one is whose updates are refused; also by who reads the run's folder."""
    site = Hostile(4, says(code, "no"))
    run(tmp_path, [*honest(), site], 5, **THREE)
    assert [number for number, _ in site.sent] == [n for n in (1, 2, 3) for _ in range(sent)]
    (excluded,) = events(tmp_path, "client_excluded")
    assert excluded["reason"].startswith("site-4: left out after 3 refused updates or errors in a row; to readmit it: ")
    (state,) = [s for s in read_state(tmp_path / "run").sites if s.site == "site-4"]
    assert (state.refusals, state.left_out) == (3, excluded["reason"])


def test_errors_between_good_updates_leave_nobody_out(tmp_path: Path) -> None:
    def every_other(message: Message, reply: Message) -> Message:
        odd = message.content["config"]["server-round"] % 2  # type: ignore[operator]
        return Message(Error(DataError.code, "no"), reply_to=message) if odd else reply

    run(tmp_path, [*honest(), Hostile(4, every_other)], 7, **THREE)
    assert len(events(tmp_path, "client_failed")) == 4
    assert not events(tmp_path, "client_excluded")
    assert read_state(tmp_path / "run").sites[-1].refusals == 1


def declaring(number: int, rows: int) -> Site:
    """A site that declares rows, and moves as its number says."""

    class Declaring(Site):
        def reply(self, message: Message) -> Message:
            reply = super().reply(message)
            if message.metadata.message_type == MessageType.TRAIN:
                told = {**reply.content["metrics"], "num-examples": rows}
                reply.content["metrics"] = MetricRecord(told)  # type: ignore[arg-type]
            return reply

    site = Declaring(number)
    site.says = {"train_rows": rows}
    return site


def changes(tmp_path: Path, rows: list[int], **admission: object) -> torch.Tensor:
    sites = [declaring(number, declared) for number, declared in enumerate(rows, start=1)]
    final = run(tmp_path, sites, 1, cohort={"min_clients": len(rows)}, admission={"norm_ratio": None, **admission})
    return final[NAME] - base()[NAME]


def moved(number: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * number + 1)
    return torch.randn(60, 2, generator=g) @ torch.randn(2, 40, generator=g)


def mean(weights: list[int]) -> torch.Tensor:
    return sum(w * moved(n) for n, w in enumerate(weights, start=1)) / sum(weights)  # type: ignore[return-value]


@pytest.mark.parametrize("norm_ratio", [None, 10.0])
def test_declared_rows_own_no_mean(tmp_path: Path, norm_ratio: float | None) -> None:
    """A site that declares 10**15 rows weighs ten times as much as the median site."""
    found = changes(tmp_path, [100, 200, 300, 400, 10**15], norm_ratio=norm_ratio)
    torch.testing.assert_close(found, mean([100, 200, 300, 400, 3000]), rtol=0, atol=1e-4)
    (capped,) = events(tmp_path, "weight_capped")
    assert capped["reason"] == (
        "site-5: it declares 1000000000000000 rows and weighs as 3000, 10 times the median of its round's sites"
    )
    trained = {r["client"]: r["train"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"}
    assert (trained["site-5"]["num_examples"], trained["site-5"]["weight"]) == (10**15, 3000)
    assert "weight" not in trained["site-4"]


@pytest.mark.parametrize(
    ("rows", "weights", "ratio"),
    [
        ([10, 20, 30, 300], [10, 20, 30, 200], 10.0),
        ([10, 100], [10, 100], 10.0),
        ([10, 101], [10, 100], 10.0),
        ([7], [7], 10.0),
        ([10, 20, 40], [10, 20, 20], 1.0),
        ([10, 20, 10**6], [10, 20, 10**6], None),
    ],
)
def test_rows_count_as_declared_up_to_ten_times_the_medians(
    tmp_path: Path, rows: list[int], weights: list[int], ratio: float | None
) -> None:
    found = changes(tmp_path, rows, rows_ratio=ratio)
    torch.testing.assert_close(found, mean(weights), rtol=0, atol=1e-4)
    assert len(events(tmp_path, "weight_capped")) == sum(r != w for r, w in zip(rows, weights, strict=True))


def test_half_a_round_that_stands_still_does_not_shut_out_the_other_half(tmp_path: Path) -> None:
    def still(message: Message, reply: Message) -> Message:
        tensors = {n: t * 1e-9 if n == LEFT else t for n, t in wire.decode(reply.content["arrays"]).items()}  # type: ignore[arg-type]
        return Message(RecordDict({**reply.content, "arrays": wire.encode(tensors)}), reply_to=message)

    run(tmp_path, [Site(1), Site(2), Hostile(3, still), Hostile(4, still)], 4, cohort={"min_clients": 4})
    assert not events(tmp_path, "update_refused", "client_excluded")


def test_node_that_is_gone_and_back_for_ever_is_given_the_work_ten_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.loop.inflight.POLL_SECONDS", 0.001)
    site = Hostile(4, lambda message, _: node_unavailable(message))
    run(tmp_path, [*honest(), site], 1, **THREE | {"cohort": {"min_clients": 3, "round_deadline": 300.0}})
    assert len(site.sent) <= 11  # once to evaluate
