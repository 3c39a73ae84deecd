"""What a SuperLink keeps: nodes outlive it, messages do not outlive their use."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, Status
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.utils import check_abort
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from server.superlink import state as module
from server.superlink.process import DATABASE
from server.superlink.state import Objects, State

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found")  # in Flower's migrations
INTERVAL, LIFE = 30.0, 100.0


def opened(folder: Path) -> State:
    return State(str(folder / DATABASE), NoOpFederationManager(), Objects())


def joined(state: State, key: str) -> int:
    node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key.encode(), INTERVAL)
    assert state.activate_node(node, INTERVAL)
    return node


def begun(state: State) -> int:
    """A run at work; messages made from now on are its own."""
    run = state.create_run("a/b", "1", "0", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert task is not None
    assert state.claim_task(task) is not None
    assert state.activate_task(task)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, SUPERLINK_NODE_ID, task
    return run


def content(number: float) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"w": Array(np.full(50, number))})})


def push(state: State, *messages: Message) -> None:
    """As a ServerApp or a SuperNode does: what the SuperLink lacks, once."""
    session = state.start_session(messages[0].metadata.run_id)
    wanted: set[str] = set()
    for message in messages:
        message.metadata.__dict__["_message_id"] = message.object_id
        stored, missing = state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        wanted.update(missing)
    objects = {key: one for message in messages for key, one in get_all_nested_objects(message).items()}
    for key in wanted:
        assert state.store_object(messages[0].metadata.run_id, session, key, objects[key].deflate())


def to(node: int, number: float) -> Message:
    return Message(content(number), node, MessageType.TRAIN, ttl=LIFE)


def answered(state: State, node: int, number: float) -> str:
    """A node takes its message, answers, and the ServerApp takes the answer; returns the message's name."""
    (message,) = state.get_message_ins(node, 1)
    name = message.metadata.message_id
    state.object_store.delete(name)  # ConfirmMessageReceived
    push(state, Message(content(number), reply_to=message))
    (reply,) = state.get_message_res({name}, message.metadata.run_id)
    state.delete_messages({name})
    state.object_store.delete(reply.metadata.message_id)
    return name


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    found = opened(tmp_path)
    yield found
    assert found.num_message_ins() == found.num_message_res() == 0, "a test ends with all answered"


def test_nodes_outlive_a_superlink_under_the_same_numbers(tmp_path: Path) -> None:
    first = opened(tmp_path)
    here, away, gone = (joined(first, key) for key in ("a", "b", "c"))
    first.deactivate_node(away)
    first.delete_node(NOOP_FLWR_AID, gone)
    again = opened(tmp_path)
    run = begun(again)
    assert again.get_nodes(run) == first.get_nodes(begun(first)) == {here}
    assert [again.get_node_id_by_public_key(key) for key in (b"a", b"b", b"c")] == [here, away, None]
    assert again.acknowledge_node_heartbeat(away, INTERVAL)
    assert not again.acknowledge_node_heartbeat(gone, INTERVAL)
    assert again.get_nodes(run) == {here, away}
    with pytest.raises(ValueError, match="Public key already in use"):
        joined(again, "a")


def test_run_of_an_earlier_life_has_ended_for_whoever_asks(tmp_path: Path) -> None:
    run = begun(opened(tmp_path))
    again = opened(tmp_path)
    assert check_abort(run, [Status.FINISHED], again) == "Run is finished."  # a site with its work is told to stop
    (told,) = again.get_run_info(run_ids=[run])
    assert (told.run_id, told.status.status) == (run, Status.FINISHED)
    assert again.federation_manager.has_member(told.flwr_aid, told.federation_id)  # so the supervisor may ask
    assert list(again.get_run_info(flwr_aids=[NOOP_FLWR_AID])) == []


def test_neither_database_nor_memory_grows_with_rounds(state: State, tmp_path: Path) -> None:
    def size() -> int:
        return sum(file.stat().st_size for file in tmp_path.glob(f"{DATABASE}*"))

    def kept() -> tuple[int, int, int]:
        return len(state.object_store), len(state._object_push_sessions), size()  # type: ignore[arg-type]

    nodes = [joined(state, f"{k}") for k in range(8)]
    run, seen = begun(state), []
    for number in range(50):
        push(state, *(to(node, number) for node in nodes))
        for node in nodes:
            answered(state, node, number + node % 97)
        seen.append(kept())
    assert seen[0] == seen[-1] == (0, 0, seen[0][2])
    assert not state.object_store.run_objects_mapping[run]  # type: ignore[attr-defined]


def test_shared_content_is_asked_for_and_kept_once(state: State) -> None:
    nodes = [joined(state, key) for key in ("a", "b")]
    begun(state)
    push(state, *(to(node, 1.0) for node in nodes))
    alone = len(get_all_nested_objects(to(nodes[0], 1.0)))
    assert len(state.object_store) == alone + 1  # type: ignore[arg-type]
    answered(state, nodes[0], 2.0)
    assert len(state.object_store) == alone  # type: ignore[arg-type]
    answered(state, nodes[1], 2.0)


def test_shared_object_is_not_deleted_while_a_message_is_entered_that_shares_it(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites answer alike, and the first answer is received just when the second is entered."""
    store = state.object_store
    assert isinstance(store, Objects)
    begun(state)
    first, second = to(SUPERLINK_NODE_ID, 1.0), to(SUPERLINK_NODE_ID, 1.0)
    trees = [get_object_tree(one) for one in (first, second)]
    run = first.metadata.run_id
    for key in store.preregister(run, trees[0]):
        store.put(key, get_all_nested_objects(first)[key].deflate())
    deletes = threading.Thread(target=store.delete, args=(trees[0].object_id,))
    walk = module.InMemoryObjectStore.preregister.__globals__["iterate_object_tree"]

    def slow(tree: ObjectTree) -> Iterator[ObjectTree]:
        for number, node in enumerate(walk(tree)):
            yield node
            if number == 0:  # the shared leaf was found to be there
                deletes.start()
                deletes.join(0.2)

    monkeypatch.setitem(module.InMemoryObjectStore.preregister.__globals__, "iterate_object_tree", slow)
    assert store.preregister(run, trees[1]) == [trees[1].object_id]
    deletes.join()
    assert trees[0].object_id not in store
    assert store.get(trees[1].children[0].object_id)
    store.delete(trees[1].object_id)


def test_content_that_nobody_fetches_does_not_stay(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, here = joined(state, "a"), joined(state, "b")
    begun(state)
    push(state, to(gone, 1.0))
    state.deactivate_node(gone)
    later = module.now().timestamp() + 1
    real = module.now
    monkeypatch.setattr(module, "now", lambda: real().fromtimestamp(later + LIFE, real().tzinfo))
    state.start_session(TaskIdentity.run_id)
    monkeypatch.undo()
    assert state.num_message_ins() == len(state.object_store) == 0  # type: ignore[arg-type]
    push(state, to(here, 2.0))
    answered(state, here, 3.0)


def test_node_is_given_its_own_messages_and_each_once(state: State) -> None:
    a, b = joined(state, "a"), joined(state, "b")
    begun(state)
    push(state, to(a, 1.0), to(b, 2.0), to(a, 3.0))
    found = state.get_message_ins(a, None)
    assert [one.metadata.dst_node_id for one in found] == [a, a]
    for one in found:
        state.object_store.delete(one.metadata.message_id)  # ConfirmMessageReceived
    assert state.get_message_ins(a, 1) == []
    assert len(state.get_message_ins(b, 1)) == 1
    state.cleanup_run(TaskIdentity.run_id)


def test_message_that_was_lost_on_the_way_is_given_again_until_it_is_confirmed(state: State) -> None:
    node = joined(state, "a")
    begun(state)
    push(state, to(node, 1.0))
    first = state.get_message_ins(node, 1)
    assert state.get_message_ins(node, 1) == first  # the connection on which the node waited was gone
    answered(state, node, 2.0)
    assert state.get_message_ins(node, 1) == []


def in_parts(state: State, message: Message) -> Iterator[None]:
    """Push a message, an object at a step; after the first step its head is there."""
    message.metadata.__dict__["_message_id"] = message.object_id
    run = message.metadata.run_id
    session = state.start_session(run)
    _, missing = state.store_message_and_object_tree(message, get_object_tree(message), session)
    yield
    objects = get_all_nested_objects(message)
    for key in missing:
        assert state.store_object(run, session, key, objects[key].deflate())
        yield


def test_message_is_given_and_rings_when_it_is_complete(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    node, other = joined(state, "a"), joined(state, "b")
    begun(state)
    steps = list(get_all_nested_objects(to(node, 1.0)))
    pushing = in_parts(state, to(node, 1.0))
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)
    for _ in steps:
        next(pushing)
        assert state.get_message_ins(node, 1) == []
        assert not state.await_message(node)
    monkeypatch.setattr(module, "WAIT_SECONDS", 600.0)
    threading.Timer(0.05, next, args=(pushing, None)).start()
    assert state.await_message(node)
    assert not state._bell(other).is_set()
    answered(state, node, 2.0)


def test_reply_is_given_when_it_is_complete(state: State) -> None:
    node = joined(state, "a")
    run = begun(state)
    push(state, to(node, 1.0))
    (message,) = state.get_message_ins(node, 1)
    name = message.metadata.message_id
    state.object_store.delete(name)
    reply = Message(content(2.0), reply_to=message)
    for number, _ in enumerate(in_parts(state, reply)):
        found = state.get_message_res({name}, run)
        assert len(found) == (number == len(get_all_nested_objects(reply)))
    state.delete_messages({name})


def taken(state: State, node: int) -> Message:
    """A node takes the message that is there for it, completely."""
    (message,) = state.get_message_ins(node, 1)
    state.object_store.delete(message.metadata.message_id)
    return message


def test_object_that_is_pushed_again_is_accepted(state: State) -> None:
    """The connection broke after the object had come, and the site's gRPC made the call again."""
    node = joined(state, "a")
    run = begun(state)
    push(state, to(node, 1.0))
    asked = taken(state, node)
    reply = Message(content(2.0), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    session = state.start_session(run)
    stored, missing = state.store_message_and_object_tree(reply, get_object_tree(reply), session)
    assert stored
    for key, one in get_all_nested_objects(reply).items():
        if key in missing:
            assert [state.store_object(run, session, key, one.deflate()) for _ in range(2)] == [True, True]
    assert not state.store_object(run, session, "0" * 64, b"an object that nobody has announced")
    assert len(state.get_message_res({asked.metadata.message_id}, run)) == 1
    state.delete_messages({asked.metadata.message_id})


def test_slow_upload_is_not_over_after_ten_minutes(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    node, real = joined(state, "a"), module.now
    run = begun(state)
    push(state, Message(content(1.0), node, MessageType.TRAIN, ttl=7200.0))
    asked = taken(state, node)
    answer = Message(content(2.0), reply_to=asked)
    parts = len(get_all_nested_objects(answer))
    for number, _ in enumerate(in_parts(state, answer)):
        if number == parts:
            break
        assert state.get_message_res({asked.metadata.message_id}, run) == []
        late = timedelta(minutes=10) * (number + 1)
        for place in (module, in_memory_corestate):
            monkeypatch.setattr(place, "now", lambda late=late: real() + late)
        state.acknowledge_node_heartbeat(node, 7200.0)
        state.start_session(run)  # another site begins to push
    (reply,) = state.get_message_res({asked.metadata.message_id}, run)
    assert not reply.has_error()
    state.delete_messages({asked.metadata.message_id})


@pytest.mark.parametrize("parts", [1, 2, 3])  # its head, and of its five objects none, one or two
def test_answer_that_its_node_has_given_up_is_told_as_lost(state: State, parts: int) -> None:
    """At whatever object the push failed: the node asks for its next message."""
    node = joined(state, "a")
    run = begun(state)
    push(state, to(node, 1.0))
    asked = taken(state, node)
    name, pushing = asked.metadata.message_id, in_parts(state, Message(content(2.0), reply_to=asked))
    for _ in range(parts):
        next(pushing)
    assert state.get_message_res({name}, run) == []
    assert state.get_message_ins(node, 1) == []
    state.start_session(run)  # another message does not forget it
    (reply,) = state.get_message_res({name}, run)
    state.delete_messages({name})
    contents = [state.get_object(run, one.object_id) for one in iterate_object_tree(get_object_tree(reply))]
    assert None in contents  # for Flower's grid: the message is unavailable
    state.start_session(run)
    assert len(state.object_store) == 0  # type: ignore[arg-type]


def test_nobody_waits_for_a_superlink_that_ends(state: State) -> None:
    node = joined(state, "a")
    threading.Timer(0.05, state.let_go).start()
    state.await_message(node)
    assert not state.await_message(node)


def test_no_more_nodes_wait_than_the_fleet_api_has_threads_to_spare(state: State) -> None:
    state._waiting = threading.BoundedSemaphore(1)
    with state._waiting:
        assert not state.await_message(joined(state, "a"))
