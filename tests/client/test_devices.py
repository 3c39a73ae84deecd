"""A site with several devices, here processes on the CPU: the same round as with one; what fails ends the round."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
import torch

from client.rank import work
from client.session import Session
from client.training import team
from client.training.team import _Other
from common.config.strategy import names
from common.errors import DataError, DivergedError, WorkerDied
from common.protocol.tensors import Tensors
from tests.client.test_session import session

ROOT = Path(__file__).parents[2]
TWO: dict[str, Any] = {"device": "cpu", "devices": 2, "device_deadline": 900}
LORA = {"rank": 2, "blocks": "lower half", "modules": "mlp"}
# Adam scales a gradient by its size, so also one that is a rounding error; SGD shows gradients as they are.
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 3, "batch_size": 4, "max_length": 64}
STRATEGIES: dict[str, dict[str, Any]] = {
    name: {"name": name, **({"rank": 2} if name == "fedftg" else LORA)} for name in names()
}
STRATEGIES["fedftg, shared"] = {"name": "fedftg", "rank": 2, "subspace": "shared"}
CARRIED: dict[str, dict[str, Any]] = {
    "averaged": {**STRATEGIES["fedftg, shared"], "optimizer_state": "averaged"},
    "kept": {"name": "fedftg", "rank": 2, "optimizer_state": "keep"},
    "kept by lora": {**STRATEGIES["fedit"], "optimizer_state": "keep"},
}


def begun(folder: Path, site: dict[str, Any], **changes: Any) -> Session:
    """A session in the federation's first state."""
    own = session(folder, site, **changes)
    state = {name: tensor.detach().clone() for name, tensor in own.exchanged.items()}
    own.set_state(state, None, list(state))
    return own


def trained(own: Session, server_round: int = 1) -> tuple[Tensors, dict[str, float]]:
    """The weights after a round, those included that stay at the site, and the round's numbers."""
    _, numbers = own.train(server_round, list(own.exchanged))
    return {name: p.detach().clone() for name, p in (own._tuned.parameters | own._tuned.local).items()}, numbers


def others(own: Session) -> list[psutil.Process]:
    """Processes of the session's other devices."""
    return [psutil.Process(other.process.pid) for other in own._team._others]


def compare(tmp_path: Path, rounds: int = 1, atol: float = 1e-6, **changes: Any) -> None:
    """So many rounds on two devices equal those on one."""
    found = []
    for site in ({"device": "cpu"}, TWO):
        if changes["strategy"]["name"] == "fedsa-lora":  # whose model no server can judge
            changes["evaluation"] = {"server": None}
        own = begun(tmp_path / str(len(site)), site, **changes)
        devices, _, held = own.hello().device.partition(", base model in ")
        assert (devices, held or "whole") == ("cpu" if len(site) == 1 else "2 x cpu", own.model.held.quantization)
        first = {name: p.detach().clone() for name, p in (own._tuned.parameters | own._tuned.local).items()}
        found.append([trained(own, number) for number in range(1, rounds + 1)])
        own._team.stop()
    for (weights, numbers), (same, told) in zip(*found, strict=True):
        assert any(not torch.equal(first[name], weights[name]) for name in weights)
        assert all(torch.allclose(same[name], weights[name], rtol=0, atol=atol) for name in weights)
        assert told["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
        assert {k: told[k] for k in ("tokens", "steps")} == {k: numbers[k] for k in ("tokens", "steps")}


class InThread(_Other):
    """The other rank as a thread, which starts at once."""

    def __init__(self, rank: int, device: torch.device, handed: dict[str, Any], ended: object) -> None:
        del ended
        self.name, self._deadline, self._reports = str(device), handed["deadline"], SimpleQueue()
        self._commands: SimpleQueue[dict[str, Any]] = SimpleQueue()
        threading.Thread(target=work, args=(handed, self._commands, self), daemon=True).start()

    def hand(self, line: dict[str, Any]) -> None:
        self._commands.put(json.loads(json.dumps(line)))

    def write(self, line: str) -> None:
        self._reports.put(json.loads(line))

    def flush(self) -> None:
        pass

    def stop(self) -> None:
        pass


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.training.team._Other", InThread)


QUICK = ("fedftg", "fedftg, shared", "fedit")


@pytest.mark.parametrize("strategy", [s if s in QUICK else pytest.param(s, marks=pytest.mark.long) for s in STRATEGIES])
def test_two_devices_train_as_one(tmp_path: Path, strategy: str, in_threads: None) -> None:
    compare(tmp_path, strategy=STRATEGIES[strategy], training=SGD)


@pytest.mark.parametrize("carried", ["averaged", "kept", pytest.param("kept by lora", marks=pytest.mark.long)])
def test_optimizer_state_that_is_carried_over_is_every_devices(tmp_path: Path, carried: str, in_threads: None) -> None:
    compare(tmp_path, rounds=2, atol=1e-4, strategy=CARRIED[carried])


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(tmp_path: Path, strategy: str) -> None:
    compare(tmp_path, strategy=STRATEGIES[strategy], training=SGD)


NF4 = {"path": "model", "quantization": "nf4"}


@pytest.mark.parametrize("strategy", [pytest.param("fedftg", marks=pytest.mark.long), "fedit"])
def test_two_devices_train_as_one_on_a_base_in_codes(tmp_path: Path, strategy: str, in_threads: None) -> None:
    compare(tmp_path, strategy=STRATEGIES[strategy], training=SGD, model=NF4)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fedftg", "fedftg, shared", "fedit"])
def test_two_processes_train_as_one_on_a_base_in_codes(tmp_path: Path, strategy: str) -> None:
    compare(tmp_path, strategy=STRATEGIES[strategy], training=SGD, model=NF4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["fedftg", "fedftg, shared", "fedit"])
def test_two_cuda_devices_train_as_one(tmp_path: Path, strategy: str) -> None:
    found = []
    for count in (1, 2):
        site = {"device": "cuda", "devices": count, "precision": "float32"}
        own = begun(tmp_path / str(count), site, strategy=STRATEGIES[strategy], training=SGD)
        found.append(trained(own))
        own._team.stop()
    (weights, numbers), (same, told) = found
    assert all(torch.allclose(same[name], weights[name], rtol=0, atol=1e-5) for name in weights)
    assert told["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    assert told["peak_memory_bytes"] > 0


def killing(own: Session, number: signal.Signals, at: int = 1) -> None:
    """Send the other device's process a signal after a step."""
    own.on_step = lambda done, steps: others(own)[0].send_signal(number) if done == at else None


def test_process_that_is_killed_ends_the_round_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    beside = psutil.Process().children()  # the fork server of an earlier test
    own = begun(tmp_path, TWO)
    killing(own, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"the process of cpu \(rank 1\) was ended by SIGKILL; the site's log says"):
        trained(own)
    assert others(own) == []
    assert set(psutil.Process().children()) <= set(beside)


def test_process_that_died_between_two_rounds_is_told_by_its_own_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that it has not read must not fail when its pipe is closed, else the others would be left running."""
    monkeypatch.setattr(team, "_PROGRAM", "raise SystemExit(3)")
    other = _Other(1, torch.device("cpu"), {"deadline": 60.0}, lambda: None)
    other.process.wait()
    other.hand({"round": 2})
    with pytest.raises(WorkerDied, match=r"of cpu \(rank 1\) ended with exit code 3"):
        other.told("done")
    other.stop()
    assert other.process.stdin is not None
    assert other.process.stdin.closed


@pytest.mark.long
def test_next_request_starts_the_process_again(tmp_path: Path) -> None:
    alone = trained(begun(tmp_path / "alone", {"device": "cpu"}, training=SGD))[0]
    own = begun(tmp_path / "two", TWO, training=SGD)
    start = own._tuned.get()
    killing(own, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        trained(own)
    own.on_step = None
    own._tuned.set(start)
    weights, _ = trained(own)
    (other,) = others(own)
    assert all(torch.allclose(weights[name], alone[name], rtol=0, atol=1e-6) for name in alone)
    own._team.stop()
    assert not other.is_running()


@pytest.mark.long
def test_process_that_is_silent_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    own = begun(tmp_path, {**TWO, "device_deadline": 60})
    found: list[psutil.Process] = []

    def pause(done: int, steps: int) -> None:
        found[:] = others(own)
        found[0].suspend()

    own.on_step = pause
    with pytest.raises(WorkerDied, match=r"the process of cpu \(rank 1\) has not answered for 60 seconds"):
        trained(own)
    (other,) = found
    assert others(own) == []
    assert not other.is_running()


@pytest.mark.long
def test_with_privacy_a_killed_process_shows_in_nothing_that_leaves(tmp_path: Path) -> None:
    privacy = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, "max_epsilon": 100.0}
    own = begun(tmp_path, {**TWO, "privacy": privacy})
    killing(own, signal.SIGKILL)
    update, _ = own.train(1, list(own.exchanged))
    assert update
    assert own.aside is not None
    assert "was ended by SIGKILL" in own.aside


@pytest.mark.long
def test_numbers_that_overflow_end_the_round_with_one_error(tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "local_steps": 3, "batch_size": 4, "max_length": 64}
    own = begun(tmp_path, TWO, training=training)
    with pytest.raises(DivergedError, match="in round 1, step 2; lower training"):
        trained(own)
    assert others(own) == []


@pytest.mark.long
def test_shard_that_changes_before_the_other_process_reads_it_is_an_error(tmp_path: Path) -> None:
    own = begun(tmp_path, TWO)
    rows = own.train_rows
    file = tmp_path / str(own.site.data.path)
    file.write_text(file.read_text() + file.read_text().replace("?", "!"))
    with pytest.raises(DataError, match=rf"rank 1\) has read \d+ training rows, not {rows}: the shard has changed"):
        trained(own)


@pytest.mark.long
def test_no_process_outlives_the_workers(tmp_path: Path) -> None:
    """A worker that is killed has no time to end anything."""
    program = (
        "import os, signal, sys; from pathlib import Path; from tests.client.test_devices import *\n"
        "own = begun(Path(sys.argv[1]), TWO); trained(own)\n"
        "print(others(own)[0].pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL
    gone = psutil.wait_procs([process for process in [find(int(done.stdout.split()[-1]))] if process], timeout=30)[1]
    assert gone == []


def find(pid: int) -> psutil.Process | None:
    """A process, if there is still one."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
