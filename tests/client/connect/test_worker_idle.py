"""An idle worker is released, but not while it has keys that a round's other sites still need."""

import time
from typing import Any

import pytest

from client.connect import worker_supervisor
from client.connect.worker_process import RuntimeApi
from client.connect.worker_supervisor import Options, WorkerSupervisor


class Worker:
    """A worker process that can be ended."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("holds", "idle", "released"), [(False, 1000.0, True), (True, 1000.0, False), (True, 4 * 3600.0 + 1000, True)]
)
def test_a_worker_with_keys_of_a_round_waits(
    holds: bool, idle: float, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(RuntimeApi, "connect", lambda *_, **__: None)
    supervisor = WorkerSupervisor(Options(RuntimeApi("unix:/nowhere"), 900.0, 0.1, None))
    made.append(Worker())
    supervisor._worker, supervisor._holds = made[0], holds
    monkeypatch.setattr(worker_supervisor.time, "monotonic", lambda now=time.monotonic: now() + idle)
    supervisor._status.state = "idle"
    monkeypatch.setattr(WorkerSupervisor, "_show", lambda *_: None)
    supervisor._release_when_idle()
    assert made[0].stopped is released
    assert (supervisor._worker is None) is released
