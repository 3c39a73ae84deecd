"""What a SuperNode does between two messages: its pauses, and what a worker that dies leaves behind."""

import threading
import time
from datetime import timedelta

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from client.superlink import turns as module
from client.superlink.turns import Turns
from client.watch.link_state import LinkState


def test_flower_still_pauses_and_answers_workers_through_its_modules() -> None:
    from flwr.supernode import main, start_client_internal
    from flwr.supernode.servicer.runtime import runtime_handlers

    assert start_client_internal.time is time  # type: ignore[attr-defined]
    assert main._RUNTIME_HANDLERS is runtime_handlers
    assert turns(0.1).monotonic is time.monotonic


def turns(longest: float) -> Turns:
    return Turns(LinkState("127.0.0.1:1"), longest)


@pytest.mark.parametrize(("seconds", "longest"), [(3.0, 0.5), (0.2, 0.5)])
def test_pause_is_cut_to_the_longest(seconds: float, longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout: waited.append(timeout))
    turns(longest).sleep(seconds)
    assert waited == [min(seconds, longest)]


def test_an_answer_of_the_worker_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_complete", lambda *_: "done")
    this, state = turns(600.0), InMemoryNodeState(ObjectStoreFactory().store())
    threading.Timer(0.05, this.complete, args=("request", state, "task")).start()
    this.sleep(600.0)


def polled(this: Turns, seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses after a poll whose empty answer took so long."""
    now, waited = [100.0], list[float]()

    def answer() -> None:
        now[0] += seconds

    monkeypatch.setattr(module, "_receive", lambda receive: receive())
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout: waited.append(timeout))
    this.receive(receive=answer)
    this.sleep(3.0)
    this.sleep(3.0)
    return waited


def test_no_pause_follows_a_poll_that_the_superlink_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert polled(turns(1.0), 5.0, monkeypatch) == [1.0]
    assert polled(turns(1.0), 0.1, monkeypatch) == [1.0, 1.0]


def test_worker_is_answered_when_a_message_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    this, order = turns(1.0), list[str]()

    def came(receive: object) -> int:
        order.append("came")
        return 7

    monkeypatch.setattr(module, "_receive", came)
    monkeypatch.setattr(module, "_acquire", lambda *_: order.append("acquired"))
    monkeypatch.setattr(module, "_WORKER_WAITS", 600.0)
    threading.Timer(0.05, this.receive, kwargs={"receive": lambda: None}).start()
    this.acquire(AcquireTaskRequest(), None)
    assert order == ["came", "acquired"]


def begun(monkeypatch: pytest.MonkeyPatch, *, pulled: bool) -> tuple[InMemoryNodeState, Message]:
    """A SuperNode's state after a worker has begun the task of a message, and that message."""
    state = InMemoryNodeState(ObjectStoreFactory().store())
    message = Message(RecordDict(), dst_node_id=7, message_type="query")
    message.metadata.__dict__ |= {"_message_id": message.object_id, "_run_id": 5}
    state.store_message(message)
    task = state.create_task("flwr-clientapp", 5)
    assert task is not None
    assert state.claim_task(task) is not None
    assert state.activate_task(task)
    if pulled:
        assert len(state.get_messages(is_reply=False)) == 1
        state.record_message_processing_start(message.metadata.message_id)
    monkeypatch.setattr(InMemoryNodeState, "_on_task_tokens_expired", module._on_tasks_expired)
    return state, message


def pass_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker be silent for two minutes."""
    monkeypatch.setattr(in_memory_corestate, "now", lambda: now() + timedelta(seconds=120))


def store(state: InMemoryNodeState, message: Message, *, parts: int) -> tuple[Message, dict[str, bytes]]:
    """An answer with so many of its contents, and the contents that are still to come."""
    answer = Message(RecordDict({"weights": ArrayRecord([np.ones(3), np.zeros(2)])}), reply_to=message)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    stored, missing = state.store_message_and_object_tree(answer, get_object_tree(answer), state.start_session(5))
    assert stored
    contents = {name: part.deflate() for name, part in get_all_nested_objects(answer).items()}
    assert contents.keys() == set(missing)
    for name in missing[:parts]:
        state.object_store.put(name, contents.pop(name))
    return answer, contents


@pytest.mark.parametrize("pulled", [True, False])
def test_message_whose_worker_died_is_answered_also_when_it_was_not_pulled(
    pulled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as flowers:
        state, _ = begun(flowers, pulled=pulled)
        flowers.undo()
        pass_away(flowers)
        assert len(state.get_messages(is_reply=True)) == pulled
    state, _ = begun(monkeypatch, pulled=pulled)
    pass_away(monkeypatch)
    (answer,) = state.get_messages(is_reply=True)
    assert answer.has_error()


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_answer_that_a_dead_worker_has_begun_gives_way_to_an_error(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, message = begun(monkeypatch, pulled=True)
    _, left = store(state, message, parts=parts)
    assert left
    pass_away(monkeypatch)
    (answer,) = state.get_messages(is_reply=True)
    assert answer.has_error()


def test_answer_that_a_worker_has_completed_before_it_died_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    state, message = begun(monkeypatch, pulled=True)
    answer, left = store(state, message, parts=99)
    assert not left
    pass_away(monkeypatch)
    assert [found.object_id for found in state.get_messages(is_reply=True)] == [answer.object_id]


@pytest.mark.parametrize("parts", [1, 99])
def test_answer_that_a_worker_gives_up_gives_way_to_an_error(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, message = begun(monkeypatch, pulled=True)
    _, left = store(state, message, parts=parts)
    (task,) = state.get_tasks()
    turns(1.0).complete(PushTaskOutputRequest(sub_status="failed", details="the answer was not taken"), state, task)
    (answer,) = state.get_messages(is_reply=True)
    assert answer.has_error() == bool(left)


@pytest.mark.parametrize("dies", [True, False])
def test_nothing_is_sent_of_an_answer_until_all_of_it_is_there(dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state, message = begun(monkeypatch, pulled=True)
    answer, left = store(state, message, parts=1)
    sent: list[Message] = []
    monkeypatch.setattr(module, "_send", lambda state: sent.extend(state.get_messages(is_reply=True)))
    monkeypatch.setattr(module, "_LOOKS", 0.01)
    sending = threading.Thread(target=turns(1.0).answer, kwargs={"state": state}, daemon=True)
    sending.start()
    sending.join(0.2)
    assert sending.is_alive()
    assert not sent
    if dies:
        pass_away(monkeypatch)
    for name, content in left.items() if not dies else ():
        state.object_store.put(name, content)
    sending.join(30)
    assert [found.has_error() for found in sent] == [dies]
    assert dies or sent[0].object_id == answer.object_id
