"""Who is waited for at the start of a run."""

import json
import time
from pathlib import Path

import pytest
from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from common.errors import FederationError, WorkerDied
from server.loop.checkpoint import newest
from server.run.folder import read_lines
from tests.harness.fake_sites import Site, node_unavailable, run

GONE = "the node is gone"


class Lost(Site):
    """Loses its hello so many times."""

    def __init__(self, number: int, code: int, times: int) -> None:
        super().__init__(number)
        self._code, self._left = code, times

    def reply(self, message: Message) -> Message:
        if message.metadata.message_type == MessageType.QUERY and self._left:
            self._left -= 1
            if self._code == ErrorCode.NODE_UNAVAILABLE:
                return node_unavailable(message)
            return Message(Error(self._code, GONE), reply_to=message)
        return super().reply(message)


@pytest.mark.parametrize("code", [WorkerDied.code, ErrorCode.NODE_UNAVAILABLE])
def test_node_whose_hello_was_lost_is_asked_again(tmp_path: Path, code: int) -> None:
    run(tmp_path, [Site(1), Lost(2, code, 2)], 1)
    checkpoint = newest(tmp_path / "run", pytest.fail)
    assert checkpoint is not None
    assert checkpoint.round == 1


def test_node_of_before_that_is_gone_is_not_counted_among_those_that_answered(tmp_path: Path) -> None:
    """A SuperLink that was restored counts the nodes of before as connected, for about a minute."""
    sites = [Lost(1, ErrorCode.NODE_UNAVAILABLE, 2), Lost(2, ErrorCode.NODE_UNAVAILABLE, 2), Site(3), Site(4)]
    slow = {3, 4}
    local = {"sites": ["a.yaml", "b.yaml"]}
    run(
        tmp_path,
        sites,
        1,
        cohort={"min_clients": 2},
        local=local,
        late=lambda number, message: 2 * (number in slow and message.metadata.message_type == MessageType.QUERY),
    )
    assert newest(tmp_path / "run", pytest.fail) is not None


def test_node_that_loses_every_hello_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=f"1 of 2 sites joined.*{GONE}") as caught:
        run(tmp_path, [Site(1), Lost(2, WorkerDied.code, 99)], 1, local={"sites": ["a.yaml", "b.yaml"]})
    assert caught.value.causes == {"node 2": "WorkerDied"}


def test_hello_that_nothing_can_be_made_of_keeps_its_node_out_and_nobody_else(tmp_path: Path) -> None:
    class Odd(Site):
        def _hello(self) -> RecordDict:
            return RecordDict({"config": MetricRecord({"site": 1})})

    run(tmp_path, [Site(1), Site(2), Odd(3)], 1, cohort={"min_clients": 2})
    (refused,) = [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == "client_refused"]
    assert (refused["client"], refused["kind"]) == ("node 3", "WireError")
    assert refused["reason"].startswith("node 3: record 'config' is a MetricRecord; allowed: ")


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_site_that_returns_under_its_key_is_given_again_what_it_had_received(tmp_path: Path, kind: str) -> None:
    """It is the same node to Flower, which says nothing of the messages that are gone."""
    folder = tmp_path / "run"
    folder.mkdir()
    register = {str(number): {"site": f"site-{number}", "activated": 1.0} for number in (1, 2)}
    (folder / "nodes.json").write_text(json.dumps(register))
    lost: list[Message] = []

    def late(number: int, message: Message) -> int:
        if number == 2 and message.metadata.message_type == kind and not lost:
            lost.append(message)
            register["2"]["activated"] = time.time() + 0.2  # after the message was sent
            (folder / "nodes.json").write_text(json.dumps(register))
        return 10**9 * any(message is gone for gone in lost)

    site = Site(2)
    run(tmp_path, [Site(1), site], 1, late=late, cohort={"min_clients": 2, "round_deadline": 60, "join_deadline": 60})
    assert newest(folder, pytest.fail) is not None
    assert site.sent.count((1, [])) == (2 if kind == MessageType.TRAIN else 1)  # to train; then evaluate
