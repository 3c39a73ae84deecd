"""A site that hangs, or whose link is away."""

import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from deploy.sandbox.flower import Flower, wait_for
from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import QUIET, SIZES, Note
from tests.faults.test_kills import FEDFTG, ROLORA
from tests.harness.agreements import agree_all
from tests.harness.processes import ROOT, Federation
from tests.harness.results import lines, same_result, trainings


@pytest.mark.long
@pytest.mark.timeout(300)
def test_site_that_hangs_is_not_waited_for_and_its_late_answer_is_dropped(tmp_path: Path, injected: Note) -> None:
    cohort = {"min_clients": 1, "round_deadline": 20.0}
    file = make_federation(tmp_path, SIZES, strategy=ROLORA, rounds=6, evaluation=QUIET, cohort=cohort)
    with Federation(file) as federation:
        for number in (2, 4):
            federation.wait_event("round_started", round=number)
            federation.wait_for(lambda: federation.works("site-b"))
            (worker,) = federation.worker_process("site-b")
            worker.send_signal(signal.SIGSTOP)
            federation.wait_event("client_failed", client="site-b", round=number)
            worker.send_signal(signal.SIGCONT)
            injected("site hangs", 1, "the round closes at its deadline; the late answer is dropped with a note")
        assert federation.wait() == 0, federation.log
    reasons = [e["reason"] for e in federation.events() if e["event"] == "client_failed"]
    assert "site-b: no answer within 20 seconds" in reasons
    assert any(e["event"] == "late_reply" and e["client"] == "site-b" for e in federation.events())
    assert (6, "site-b") in trainings(federation.run)


class Proxy:
    """A TCP connection to a SuperLink that can be cut."""

    def __init__(self, target: int) -> None:
        self._target, self._open = target, True
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.close()
        self.mend()

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self._open = False

    def mend(self) -> None:
        for one in self._pairs:
            one.close()
        self._pairs.clear()
        self._open = True

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # closed
                return
            if not self._open:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except ConnectionRefusedError:  # the federation is over
                near.close()
                continue
            self._pairs += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self._open:
                    sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            one.close()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("away", [20.0, 100.0], ids=["short", "longer than the heartbeat"])
def test_site_whose_link_was_away_takes_part_again_and_nothing_is_lost(
    tmp_path: Path, injected: Note, straight: Callable[..., Path], away: float
) -> None:
    cohort = {"min_clients": 2, "round_deadline": 300.0}
    file = agree_all(make_federation(tmp_path, SIZES, strategy=FEDFTG, rounds=4, evaluation=QUIET, cohort=cohort))
    run = tmp_path / "run"

    def happened(**fields: object) -> bool:
        return any(fields.items() <= event.items() for event in lines(run / "events.jsonl"))

    with Flower(tmp_path) as flower, Proxy(flower.fleet) as proxy:
        flower.start_node("a", f'site="{tmp_path / "site-a"}.yaml"')
        flower.start_node("b", f'site="{tmp_path / "site-b"}.yaml"', superlink=proxy.port)
        flower.submit(ROOT, {"federation": str(file), "run-dir": str(run)})
        wait_for(lambda: happened(event="round_started", round=2), 180)
        time.sleep(random.random() * 5)
        proxy.cut()
        time.sleep(away)
        proxy.mend()
        injected(f"link away for {away:g} s")
        flower.wait(400)
    same_result(run, straight(FEDFTG, 4), tmp_path)
    assert trainings(run) == trainings(straight(FEDFTG, 4))
