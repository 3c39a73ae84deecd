"""A site that hangs, whose link is away, or whose updates are poisoned."""

import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import yaml

from deploy.sandbox.flower import Flower, wait_for
from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import QUIET, SIZES, Note
from tests.faults.test_kills import FEDFTG, ROLORA
from tests.harness.processes import ROOT, Federation
from tests.harness.results import lines, same_result, trainings

FLEXLORA, FFALORA = {**ROLORA, "name": "flexlora"}, {**ROLORA, "name": "ffa-lora"}
POISON = Path(__file__).parent / "poison_app"
KINDS = [
    "nan",
    "infinity",
    "scaled by 1e6",
    "scaled by -1e6",
    "wrong shape",
    "wrong rank",
    "wrong type",
    "a tensor is missing",
    "one tensor more",
    "renamed tensor",
    "of another round",
    "no arrays",
    "no num-examples",
    "num-examples 0",
    "num-examples -15",
    "num-examples 10**9",
]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_site_that_hangs_is_not_waited_for_and_its_late_answer_is_dropped(tmp_path: Path, injected: Note) -> None:
    cohort = {"min_clients": 1, "round_deadline": 20.0}
    file = make_federation(tmp_path, SIZES, strategy=ROLORA, rounds=6, evaluation=QUIET, cohort=cohort)
    with Federation(file) as federation:
        for number in (2, 4):
            federation.wait_event("round_started", round=number)
            federation.wait_for(lambda: federation.works("site-b"))
            (bench,) = federation.bench("site-b")
            bench.send_signal(signal.SIGSTOP)
            federation.wait_event("client_failed", client="site-b", round=number)
            bench.send_signal(signal.SIGCONT)
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
    file = make_federation(
        tmp_path, SIZES, strategy=FEDFTG, rounds=4, evaluation=QUIET, cohort={"min_clients": 2, "round_deadline": 300.0}
    )
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


HONEST = 3  # rounds before the plan


def planned(folder: Path, strategy: dict[str, object], kinds: list[str]) -> Path:
    """The run folder of a federation whose third site follows the plan from round 4 on, but for the last round.

    It says hello during round 1 and fails until the plan begins, so that it does not matter when it joins.
    """
    sizes = {**SIZES, "site-c": 11}
    file = make_federation(
        folder,
        sizes,
        strategy=strategy,
        rounds=HONEST + len(kinds) + 1,
        evaluation=QUIET,
        cohort={"min_clients": 2, "round_deadline": 200.0},
        admission={"max_refusals": 99},
    )
    plan = {str(number): kind for number, kind in enumerate(["fails"] * HONEST + kinds, start=1)}
    (folder / "site-c.yaml.plan").write_text(yaml.safe_dump(plan))
    run = folder / "run"
    with Flower(folder) as flower:
        for site in sizes:
            flower.start_warm_node(site, f'site="{folder / site}.yaml"', folder / f"{site}.json")
        flower.submit(POISON, {"federation": str(file), "run-dir": str(run)})
        wait_for(lambda: any(e["event"] == "round_started" for e in lines(run / "events.jsonl")), 180)
        (folder / "site-c.yaml.go").touch()
        flower.wait(400)
    return run


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", [FEDFTG, ROLORA, FLEXLORA, FFALORA], ids=lambda strategy: strategy["name"])
def test_poisoned_updates_never_touch_the_result(tmp_path: Path, injected: Note, strategy: dict[str, object]) -> None:
    """The result is the one of a federation in which the site fails in those rounds."""
    runs = [
        planned(tmp_path / name, strategy, kinds)
        for name, kinds in (("poisoned", KINDS), ("failing", ["fails"] * len(KINDS)))
    ]
    events = lines(runs[0] / "events.jsonl")
    refused = {e["round"]: e["reason"] for e in events if e["event"] == "update_refused"}
    for number, kind in enumerate(KINDS, start=HONEST + 1):
        assert number in refused, f"{kind} was admitted"
        assert refused[number].startswith("site-c: ")
        injected(f"update: {kind}", 1, "refused with its reason; the result is the one without it")
    same_result(*runs, runs[1].parent)
    assert trainings(runs[0]) == trainings(runs[1])
