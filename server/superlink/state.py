"""The state of a SuperLink: its nodes on the disk, everything else in memory (decision 035).

Flower 1.39 keeps all or nothing: with a database every question of a site and every object of a message is several
transactions. Only the nodes must outlive the SuperLink, because a SuperNode goes on under the number that it was given;
an interrupted round is asked for again in a new run (decision 011).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
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

    # Messages: content that nobody will fetch does not stay until the run ends

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """See ``LinkState.get_message_ins``. Flower's looks at the messages of all nodes, for each that asks."""
        with self.lock:
            waiting = [
                message_id
                for message_id, message in self.message_ins_store.items()
                if message.metadata.dst_node_id == node_id
                and message.metadata.delivered_at == ""
                and run_id in (None, message.metadata.run_id)
            ]
            self._check_stored_messages(set(waiting))
            found = [self.message_ins_store[i] for i in waiting if i in self.message_ins_store][:limit]
            for message in found:
                message.metadata.delivered_at = now().isoformat()
            return found

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
                self._cleanup_push_session(key, cleanup_messages=bool(one.pending_object_ids))
        return super().start_session(run_id)


def _ended(run_id: int) -> Run:
    return replace(Run.create_empty(run_id), federation_id=NOOP_FEDERATION_ID, flwr_aid=NOOP_FLWR_AID, status=_EARLIER)
