"""Between ServerApp and SuperLink calls fail at every stage, and a run ends as if they had not.

Flower's own grid, handlers and messages; of its transport only HTTP is left out.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from server.loop import transport
from server.loop.inflight import InFlight
from server.loop.transport import SuperLinkLost
from server.superlink.process import DATABASE
from server.superlink.state import Objects, State
from tests.harness.fake_sites import Site, run
from tests.harness.results import lines

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found")  # in Flower's migrations
CALLS = ("GetNodes", "PushMessages", "PushObject", "PullMessages", "PullObject", "ConfirmMessageReceived")


@dataclass
class Link:
    """A SuperLink, its sites, and the calls to it; each site works when it is looked for.

    Attributes:
        fails: whether a call fails: "before" it has an effect, "after" it, or "" not at all; "expired" and "replaced":
            the session of the push that the call belongs to has ended, or the same messages were pushed once more.
        gives_up: how many objects of an answer a site pushes before its push fails for good; None: all.
        called: names of the calls so far.
        pushed: the last messages that were pushed.
    """

    state: State
    sites: dict[int, Site]
    task: Task
    fails: Callable[[str], str] = lambda call: ""
    gives_up: Callable[[Message], int | None] = lambda reply: None
    called: list[str] = field(default_factory=list)
    pushed: Any = None

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        if name not in CALLS:
            raise AttributeError(name)
        steps = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
        handler = getattr(runtime_handlers, steps)

        def call(request: Any) -> Any:
            self.called.append(name)
            how = self.fails(name)
            if how == "before":
                raise httpx.ReadTimeout("before")
            if name == "PullMessages":
                self._work()
            if name == "PushMessages":
                self.pushed = request
            if how == "expired":
                for session in self.state._object_push_sessions.values():
                    session.expires_at = datetime.fromtimestamp(0, UTC)
            if how == "replaced":
                runtime_handlers.push_messages(self.pushed, self.state, self.task)
            answer = handler(request, self.state, self.task)
            if how == "after":
                raise httpx.ReadTimeout("after")
            return answer

        return call

    def _work(self) -> None:
        for node, site in self.sites.items():
            for message in self.state.get_message_ins(node, None):
                tree = self.state.object_store.get_object_tree(message.metadata.message_id)
                contents = {
                    one.object_id: self.state.object_store.get(one.object_id) for one in iterate_object_tree(tree)
                }
                if not all(contents.values()):
                    message.metadata.delivered_at = ""  # it is not there completely: asked for again
                    continue
                self.state.object_store.delete(tree.object_id)
                whole: Any = inflate_object_from_contents(tree.object_id, contents)  # type: ignore[arg-type]
                whole.metadata.__dict__["_message_id"] = tree.object_id
                self._answer(site.reply(whole))

    def _answer(self, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        session = self.state.start_session(self.task.run_id)
        stored, missing = self.state.store_message_and_object_tree(reply, get_object_tree(reply), session)
        objects = [pair for pair in get_all_nested_objects(reply).items() if pair[0] in missing]
        for key, one in objects[: self.gives_up(reply)] if stored else ():
            assert self.state.store_object(self.task.run_id, session, key, one.deflate())


def linked(folder: Path, count: int) -> tuple[HttpGrid, Link]:
    folder.mkdir()
    state = State(str(folder / DATABASE), NoOpFederationManager(), Objects())
    nodes = [state.create_node(NOOP_FLWR_AID, "", f"{k}".encode(), 3600.0) for k in range(count)]
    assert all(state.activate_node(node, 3600.0) for node in nodes)
    number = state.create_run("a/b", "1", "0", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
    (found,) = state.get_run_info(run_ids=[number])
    assert found.primary_task_id is not None
    assert state.claim_task(found.primary_task_id)
    assert state.activate_task(found.primary_task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = number, SUPERLINK_NODE_ID, found.primary_task_id
    link = Link(state, {n: Site(k) for k, n in enumerate(nodes, 1)}, Task(task_id=found.primary_task_id, run_id=number))
    grid = HttpGrid(token="x", insecure=True)  # noqa: S106 - there is no other side
    grid.set_run(found)
    grid._client = link  # type: ignore[assignment]
    return grid, link


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_WAITS", (0.0,) * 8)
    monkeypatch.setattr("server.loop.inflight.POLL_SECONDS", 0.001)


def trained(folder: Path, fails: Callable[[str], str]) -> tuple[dict[str, torch.Tensor], Link]:
    grid, link = linked(folder, 3)
    link.fails = fails
    return run(folder, list(link.sites.values()), 2, grid=grid), link


def test_calls_that_fail_change_nothing(tmp_path: Path) -> None:
    drawn, counts = random.Random(1), Counter[str]()

    def fails(call: str) -> str:
        counts[call] += 1
        ends = {5: "expired", 8: "replaced"} if call == "PushObject" else {}
        always = ({1: "before", 3: "after"} | ends).get(counts[call])
        return always or (drawn.choice(("before", "after", *ends.values())) if drawn.random() < 0.1 else "")

    straight, undisturbed = trained(tmp_path / "straight", lambda call: "")
    for number in range(2):
        disturbed, link = trained(tmp_path / f"{number}", fails)
        assert len(link.called) > len(undisturbed.called)
        assert all(torch.equal(disturbed[name], straight[name]) for name in straight)
    assert min(counts[call] for call in CALLS) > 3


def test_answers_that_sites_cannot_send_are_asked_for_again(tmp_path: Path) -> None:
    """Introductions and updates; scores after the last round are told as missing. Nobody waits for a deadline."""
    lost = Counter[str]()

    def gives_up(reply: Message) -> int | None:
        kind = reply.metadata.message_type
        lost[kind] += 1
        return lost[kind] % 3 if lost[kind] < 4 else None

    straight, _ = trained(tmp_path / "straight", lambda call: "")
    grid, link = linked(tmp_path / "lost", 3)
    link.gives_up = gives_up
    again = run(tmp_path / "lost", list(link.sites.values()), 2, grid=grid)
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert (lost["query"], lost["train"], lost["evaluate"]) == (3 + 3, 2 * 3 + 3, 3)
    failed = [e for e in lines(tmp_path / "lost" / "run" / "events.jsonl") if e["event"] == "client_failed"]
    assert all("Reply message objects are unavailable" in e["reason"] for e in failed)
    assert {e["round"] for e in failed} == {2}  # of the scores; two sites' are alike, and share what one has pushed


def test_superlink_that_answers_nothing_is_lost_and_the_run_is_not(tmp_path: Path) -> None:
    grid, link = linked(tmp_path / "x", 1)
    link.fails = lambda call: "before"
    with pytest.raises(SuperLinkLost, match="9 calls to the SuperLink failed, the last one with: before"):
        run(tmp_path / "x", list(link.sites.values()), 1, grid=grid)


def test_superlink_is_asked_once_for_all_and_gives_one_content_at_a_time(tmp_path: Path) -> None:
    grid, link = linked(tmp_path / "x", 3)
    in_flight = InFlight(grid)
    content = Site(1)._hello()
    in_flight.push([Message(content, node, "query", ttl=60.0) for node in link.sites], "hello")
    link.called.clear()
    replies = in_flight.arrived("hello")
    next(replies)
    first = link.called.count("PullObject")
    assert link.called.count("PullMessages") == 1
    list(replies)
    assert (link.called.count("PullMessages"), link.called.count("PullObject")) == (1, 3 * first)


def test_node_that_left_just_before_is_answered_for(tmp_path: Path) -> None:
    grid, link = linked(tmp_path / "x", 2)
    gone, here = link.sites
    link.state.delete_node(NOOP_FLWR_AID, gone)
    in_flight = InFlight(grid)
    in_flight.push([Message(Site(1)._hello(), node, "query", ttl=60.0) for node in (gone, here)], "hello")
    replies = {sent.node_id: reply for sent, reply in in_flight.arrived("hello")}
    assert replies[gone].has_error()
    assert not replies[here].has_error()
