"""The state of a SuperLink: its nodes on the disk, everything else in memory (decision 035).

Flower 1.39 keeps all or nothing: with a database every question of a site and every object of a message is several
transactions. Only the nodes must outlive the SuperLink, because a SuperNode goes on under the number that it was given;
an interrupted round is asked for again in a new run (decision 011).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from threading import BoundedSemaphore, Event, Lock
from typing import Any, TypeVar

from flwr.app import Message
from flwr.common.constant import NOOP_FLWR_AID, Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.date import now
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import Run, RunStatus
from flwr.superlink.federation import FederationManager

Answer = TypeVar("Answer")
WAIT_SECONDS, MOST_WAITING = 5.0, 500  # a node's longest wait for a message; half of the Fleet API's threads
PUSH_SECONDS = 1800.0  # in which an object of a message must come; Flower's 180 seconds end 35 MB over 1 Mbit/s
_EARLIER = RunStatus(Status.FINISHED, SubStatus.FAILED, "the SuperLink does not know it any more")


class Objects(InMemoryObjectStore):
    """The content of messages. Objects that messages share are kept, and handed over, once."""

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """As Flower's, but nothing is deleted between two objects of a tree.

        Flower's locks each object alone: a shared object whose last message is received meanwhile is gone when the
        message that was found to share it is entered, and that message is lost.
        """
        with self.lock_store:
            return super().preregister(run_id, object_tree)

    def complete(self, object_id: str) -> bool:
        """Whether an object is here with all that belongs to it."""
        with self.lock_store:
            entry = self.store.get(object_id)
            return entry is not None and entry.is_available and all(map(self.complete, entry.child_object_ids))


class State(InMemoryLinkState):
    """Flower's state in memory, with the nodes in a database.

    Args:
        database: path of the SQLite file.
        manager: Flower's manager of federations.
        objects: where the content of messages is.
    """

    def __init__(self, database: str, manager: FederationManager, objects: Objects) -> None:
        self._disk = SqlLinkState(database, manager, objects)
        self._disk.initialize()
        super().__init__(manager, objects)
        self._lock_object_push_sessions = self.lock  # Flower takes the two in either order: threads may wait for ever
        self._disk_lock = Lock()  # the copy of a node is of the last change that was written
        self._objects, self._bells = objects, dict[int, Event]()  # by node: a message for it is complete
        self._waiting, self._ends = BoundedSemaphore(MOST_WAITING), False
        for node in self._disk.get_node_info():
            self._remember(node)

    # Nodes: written first, then copied

    def create_node(self, *args: Any, **options: Any) -> int:  # noqa: ANN401 - as Flower's
        """See ``LinkState.create_node``."""
        with self._disk_lock:
            node_id = self._disk.create_node(*args, **options)
            self._remember(*self._disk.get_node_info(node_ids=[node_id]))
            return node_id

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """See ``LinkState.delete_node``."""
        self._written(node_id, lambda: self._disk.delete_node(owner_aid, node_id))

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """See ``LinkState.activate_node``."""
        return self._written(node_id, lambda: self._disk.activate_node(node_id, heartbeat_interval))

    def deactivate_node(self, node_id: int) -> bool:
        """See ``LinkState.deactivate_node``."""
        return self._written(node_id, lambda: self._disk.deactivate_node(node_id))

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """See ``LinkState.acknowledge_node_heartbeat``."""
        return self._written(node_id, lambda: self._disk.acknowledge_node_heartbeat(node_id, heartbeat_interval))

    def _written(self, node_id: int, change: Callable[[], Answer]) -> Answer:
        with self._disk_lock:
            answer = change()
            self._remember(*self._disk.get_node_info(node_ids=[node_id]))
            return answer

    def _remember(self, *nodes: Any) -> None:  # noqa: ANN401 - Flower's NodeInfo
        with self.lock:
            for node in nodes:
                self.nodes[node.node_id] = node
                self.node_public_key_to_node_id[node.public_key] = node.node_id
                self.owner_to_node_ids.setdefault(node.owner_aid, set()).add(node.node_id)

    # Runs: one that began before a restart has ended, for a site that still has its work as for its supervisor

    def get_run_info(self, *, run_ids: Sequence[int] | None = None, **filters: Any) -> Sequence[Run]:  # noqa: ANN401
        """See ``LinkState.get_run_info``."""
        found = list(super().get_run_info(run_ids=run_ids, **filters))
        unknown = [] if any(filters.values()) else set(run_ids or ()) - self.run_ids.keys()
        return found + [_ended(run_id) for run_id in unknown]

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """See ``LinkState.get_run_status``."""
        return dict.fromkeys(run_ids, _EARLIER) | super().get_run_status(run_ids)

    # Messages: handed out when they are complete, to a node that waits; content that nobody will fetch does not stay

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """See ``LinkState.get_message_ins``. Flower's looks at the messages of all nodes, for each that asks.

        A node asks when it has confirmed the last message, and sent its answer. One that was handed out and is not
        confirmed was lost on the way, e.g. with the connection on which the node waited, and is handed out again. An
        answer that is not complete was given up, and whoever waits for it is told so.
        """
        with self.lock:
            self._give_up_answers(node_id)
            self._bell(node_id).clear()
            waiting = {
                message_id
                for message_id, message in self.message_ins_store.items()
                if message.metadata.dst_node_id == node_id
                and run_id in (None, message.metadata.run_id)
                and not self._is_finished_run(message.metadata.run_id)
                and self._objects.complete(message_id)
            }
            self._check_stored_messages(waiting)
            found = [message for i, message in self.message_ins_store.items() if i in waiting][:limit]
            for message in found:
                message.metadata.delivered_at = now().isoformat()
            return found

    def await_message(self, node_id: int) -> bool:
        """Wait until a message for a node is complete; returns False when seconds have passed, or too many wait."""
        if self._ends or not self._waiting.acquire(blocking=False):
            return False
        try:
            return self._bell(node_id).wait(WAIT_SECONDS)
        finally:
            self._waiting.release()

    def let_go(self) -> None:
        """Let no node wait any more: the SuperLink ends."""
        self._ends = True
        for bell in list(self._bells.values()):
            bell.set()

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """See ``CoreState.store_message_and_object_tree``."""
        with self.lock:
            stored = super().store_message_and_object_tree(message, object_tree, session_id)
            self._announce({message.metadata.message_id})
            return stored

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """See ``CoreState.store_object``."""
        with self.lock:
            session = self._object_push_sessions.get(session_id)
            stored = super().store_object(run_id, session_id, object_id, object_content)
            if session is not None:
                session.expires_at = now() + timedelta(seconds=PUSH_SECONDS)
                if not session.pending_object_ids:
                    self._announce(session.root_object_ids)
            # An object that came before, and whose sender did not hear of it, is there: an id is its content's digest.
            return stored or bool(self._objects.get(object_id))

    def _give_up_answers(self, node_id: int) -> None:
        for session in self._object_push_sessions.values():
            answers = [self.message_res_store.get(root) for root in session.root_object_ids]
            if any(one is not None and one.metadata.src_node_id == node_id for one in answers):
                session.expires_at = now()

    def _announce(self, message_ids: set[str]) -> None:
        for message_id in message_ids & self.message_ins_store.keys():
            if self._objects.complete(message_id):
                self._bell(self.message_ins_store[message_id].metadata.dst_node_id).set()

    def _bell(self, node_id: int) -> Event:
        return self._bells.setdefault(node_id, Event())

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """See ``LinkState.get_message_res``. A reply that is on its way is none yet: who pulled it would wait."""
        with self.lock:
            replies, sessions = self.message_ins_id_to_message_res_id, self._object_push_session_by_root
            coming = {
                i for i in message_ids if (reply := replies.get(i)) in sessions and not self._over(sessions[reply])
            }
            return super().get_message_res(message_ids - coming, run_id)

    def _over(self, session_id: str) -> bool:
        session = self._object_push_sessions.get(session_id)
        return session is None or not session.pending_object_ids or session.expires_at <= now()

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """See ``LinkState.delete_messages``. The content of a message that its node never received goes, too."""
        super().delete_messages(message_ins_ids)
        for message_id in message_ins_ids:
            self.object_store.delete(message_id)

    def start_session(self, run_id: int) -> str:
        """See ``CoreState.start_session``. Forgets messages and sessions whose time is over."""
        current = now()
        with self.lock:
            self.delete_messages(
                {
                    message_id
                    for message_id, message in self.message_ins_store.items()
                    if message.metadata.created_at + message.metadata.ttl <= current.timestamp()
                }
            )
            over = [(key, one) for key, one in self._object_push_sessions.items() if one.expires_at <= current]
            for key, one in over:
                if not self._awaited(one.root_object_ids):
                    self._cleanup_push_session(key, cleanup_messages=bool(one.pending_object_ids))
            session_id = super().start_session(run_id)
            self._object_push_sessions[session_id].expires_at = current + timedelta(seconds=PUSH_SECONDS)
            return session_id

    def _awaited(self, message_ids: set[str]) -> bool:
        """Whether one of these messages is an answer of which the ServerApp was not told yet that it is lost."""
        return not self.message_res_store.keys().isdisjoint(message_ids)


def _ended(run_id: int) -> Run:
    return replace(Run.create_empty(run_id), federation_id=NOOP_FEDERATION_ID, flwr_aid=NOOP_FLWR_AID, status=_EARLIER)
