"""A SuperNode whose link ends, for a time or for good."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from client.connect import link
from client.connect.link import Link
from client.watch.link_state import LinkState


def test_call_that_a_stopping_superlink_cancels_is_tried_again() -> None:
    class Cancelled(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.CANCELLED

        def details(self) -> str:
            return "CANCELLED"

    assert Link("127.0.0.1:1", None, None, 0.0, LinkState("127.0.0.1:1")).judge(Cancelled()) is False


def test_loop_that_ends_by_an_error_ends_the_program_though_its_runtime_api_still_serves(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    code = "import sys, threading, time; from client.connect import link; from deploy.cli import main; "
    code += "link.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(600,)).start(); sys.exit(main())"
    options = ["--socket", str(tmp_path / "s"), "--superlink", address, "--insecure"]
    command = [sys.executable, "-c", code, "site", "supernode", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    server.stop(None)
    assert done.returncode == 1
    assert f"error: the link to {address} ended" in done.stderr


@pytest.mark.parametrize("pulled", [True, False])
def test_message_whose_worker_died_is_answered_also_when_it_was_not_pulled(
    pulled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> int:
        """Answers that the SuperNode sends after a worker has begun a message's task and was not heard of again."""
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
        with monkeypatch.context() as later:
            later.setattr(in_memory_corestate, "now", lambda: now() + timedelta(seconds=120))
            return len(state.get_messages(is_reply=True))

    assert answers() == pulled  # Flower's own
    monkeypatch.setattr(InMemoryNodeState, "_on_task_tokens_expired", link._on_tasks_expired)
    assert answers() == 1
