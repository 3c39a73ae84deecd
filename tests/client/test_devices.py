"""A site with several devices, here processes on the CPU: the same round as with one; what fails ends the round."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from client.session import Session
from common.config.strategy import names
from common.errors import DataError, DivergedError, WorkerDied
from common.protocol.tensors import Tensors
from tests.client.test_session import session

ROOT = Path(__file__).parents[2]
TWO: dict[str, Any] = {"device": "cpu", "devices": 2, "device_deadline": 120}
LORA = {"rank": 2, "blocks": "lower half", "modules": "mlp"}
STRATEGIES: dict[str, dict[str, Any]] = {
    name: {"name": name, **({"rank": 2} if name == "fedftg" else LORA)} for name in names()
}
STRATEGIES["fedftg, shared"] = {"name": "fedftg", "rank": 2, "subspace": "shared"}
STRATEGIES["fedftg, shared, averaged"] = {**STRATEGIES["fedftg, shared"], "optimizer_state": "averaged"}
STRATEGIES["fedftg, kept"] = {"name": "fedftg", "rank": 2, "optimizer_state": "keep"}
STRATEGIES["fedit, kept"] = {**STRATEGIES["fedit"], "optimizer_state": "keep"}


def begun(folder: Path, site: dict[str, Any], **changes: Any) -> Session:
    """A session in the federation's first state."""
    own = session(folder, site, **changes)
    state = {name: tensor.detach().clone() for name, tensor in own.exchanged.items()}
    own.set_state(state, None, list(state))
    return own


def trained(own: Session, server_round: int = 1) -> tuple[Tensors, dict[str, float]]:
    """The weights after a round, and the round's numbers."""
    _, numbers = own.train(server_round, list(own.exchanged))
    return {name: p.detach().clone() for name, p in own._tuned.parameters.items()}, numbers


def others(own: Session) -> list[psutil.Process]:
    """Processes of the session's other devices."""
    return [psutil.Process(other.process.pid) for other in own._team._others]


def compare(tmp_path: Path, strategy: str) -> None:
    """Two rounds on two devices equal those on one."""
    found = []
    for site in ({"device": "cpu"}, TWO):
        own = begun(tmp_path / str(len(site)), site, strategy=STRATEGIES[strategy])
        assert own.hello().device == ("cpu" if len(site) == 1 else "2 x cpu")
        rounds = [trained(own, number) for number in (1, 2)]
        own._team.stop()
        found.append((rounds, own.kept))
    (alone, kept), (together, also_kept) = found
    for (weights, numbers), (same, told) in zip(alone, together, strict=True):
        assert all(torch.allclose(same[name], weights[name], rtol=0, atol=1e-6) for name in weights)
        assert told["loss"] == pytest.approx(numbers["loss"], rel=1e-6)
        assert {k: told[k] for k in ("tokens", "steps")} == {k: numbers[k] for k in ("tokens", "steps")}
    assert kept.keys() == also_kept.keys()


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_devices_train_as_one(tmp_path: Path, strategy: str) -> None:
    compare(tmp_path, strategy)


def killing(own: Session, number: signal.Signals, at: int = 1) -> None:
    """Send the other device's process a signal after a step."""
    own.on_step = lambda done, steps: others(own)[0].send_signal(number) if done == at else None


def test_process_that_is_killed_ends_the_round_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    own = begun(tmp_path, TWO)
    killing(own, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"the process of cpu \(rank 1\) was ended by SIGKILL; the site's log says"):
        trained(own)
    assert others(own) == []
    assert psutil.Process().children() == []


@pytest.mark.long
def test_next_request_starts_the_process_again(tmp_path: Path) -> None:
    alone = trained(begun(tmp_path / "alone", {"device": "cpu"}))[0]
    own = begun(tmp_path / "two", TWO)
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
