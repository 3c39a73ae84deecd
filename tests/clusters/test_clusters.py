"""Experiments on a Ray cluster and on Slurm themselves: the same numbers as on this machine, whatever dies on the way.

They need the extras `ray` and `slurm`: `make cluster-test` installs both; without them these tests fail. The tests on
Slurm need its programs, too (apt-get install slurmctld slurmd slurm-client), and are skipped where they are not.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.system.processes import free_ports, listens
from deploy.sandbox.flower import wait_for
from server.run.folder import read_lines
from tests.deploy.experiment.test_experiment import make_experiment
from tests.harness.processes import FEDSPAN, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
RAY = str(Path(sys.executable).parent / "ray")
SECONDS, ROUNDS = 1500.0, 10
NEEDS = ("slurmctld", "slurmd", "sbatch", "srun")
SLURM = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={first}
SlurmdPort={second}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def start(file: Path, out: Path, *options: str, **env: str) -> subprocess.Popen[str]:
    command = [*FEDSPAN, "experiment", str(file), "--out", str(out), *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**environment(), **env}, start_new_session=True, **pipes)


def ended(experiment: subprocess.Popen[str]) -> tuple[int, str]:
    told, _ = experiment.communicate(timeout=SECONDS)
    return experiment.returncode, told


def run(file: Path, out: Path, *options: str, **env: str) -> tuple[int, str]:
    return ended(start(file, out, *options, **env))


def results(out: Path) -> dict[str, list[Any]]:
    """All records of all cells without times and memory: losses and scores in full precision, norms, bytes."""
    found = {}
    for file in sorted(out.glob("*/*/metrics.jsonl")):
        records = [{key: one[key] for key in ("round", "client", "phase")} | numbers(one) for one in read_lines(file)]
        found[str(file.parent.relative_to(out))] = sorted(records, key=lambda one: [str(one[k]) for k in one][:3])
    return found


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Sections of a record that hold no time; of training's, its speed is left out."""
    kept = {key: record[key] for key in ("evaluate", "train", "bytes", "norms") if key in record}
    return {key: {k: v for k, v in one.items() if k != "tokens_per_second"} for key, one in kept.items()}


def resumed(out: Path) -> int:
    return sum(one["event"] == "resumed" for file in out.glob("select/*/events.jsonl") for one in read_lines(file))


def trials(out: Path) -> list[psutil.Process]:
    """The living trials of an experiment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if any(word.endswith("experiment/trial.py") for word in line) and any(
                word.startswith(str(out)) for word in line
            ):
                found.append(process)
    return found


def at_work(out: Path) -> psutil.Process:
    """A trial of the selection that has written a checkpoint."""
    wait_for(lambda: list(out.glob("select/*/checkpoints/*")) and trials(out), SECONDS, every=0.02)
    return trials(out)[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experiment(tmp_path_factory.mktemp("experiment"), federation__rounds=ROUNDS, grid__seeds=[0])


@pytest.fixture(scope="module")
def here(file: Path) -> dict[str, list[Any]]:
    """The results of trials on this machine."""
    out = file.parent / "here"
    code, told = run(file, out, "--cpus-per-trial", "1")
    assert code == 0, told
    return results(out)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and environment of a Ray cluster: a head without CPUs, and two nodes with one each."""
    folder = tmp_path_factory.mktemp("ray")
    short = Path("/tmp") / f"ray-{os.getpid()}"  # noqa: S108 - the path of a socket has 107 bytes
    env = {**environment(), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    env |= {"RAY_memory_monitor_refresh_ms": "0"}  # other tests may fill this machine
    (port,) = free_ports(1)
    head = ["--num-cpus=0", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}"]
    try:
        worker = ["--num-cpus=1", f"--address=127.0.0.1:{port}"]
        for options in (head, worker, worker):
            command = [RAY, "start", "--num-gpus=0", "--object-store-memory=100000000", *options]
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=300, cwd=folder)
        yield f"127.0.0.1:{port}", {"RAY_AUTH_MODE": "disabled"}
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(short) in " ".join(process.cmdline()):
                    process.kill()
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm cluster of this machine."""
    programs = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in NEEDS}
    if None in programs.values():
        pytest.skip(f"Slurm is not installed: {programs}")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    first, second = free_ports(2)
    user, cpus = psutil.Process().username(), len(os.sched_getaffinity(0))
    told = SLURM.format(folder=folder, host=host, first=first, second=second, user=user, cpus=cpus)
    (folder / "slurm.conf").write_text(told)
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    started = []
    try:
        for name, port in (("slurmctld", first), ("slurmd", second)):
            with (folder / f"{name}.log").open("wb") as log:
                command = [str(programs[name]), "-D"]
                started.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log))
            wait_for(lambda port=port: listens(port), 30)  # type: ignore[misc]
        yield env
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


@pytest.fixture(params=["ray of its own", "ray", "slurm"])
def place(request: pytest.FixtureRequest) -> tuple[list[str], dict[str, str]]:
    """Options and environment of an experiment on a cluster."""
    if request.param == "slurm":
        return ["--on", "slurm", "--slurm", "time=30"], request.getfixturevalue("slurm")
    if request.param == "ray":
        address, env = request.getfixturevalue("cluster")
        return ["--on", "ray", "--address", address], env
    return ["--on", "ray"], {}


def test_numbers_are_those_of_trials_on_this_machine_bit_for_bit(
    tmp_path: Path, file: Path, here: dict[str, list[Any]], place: tuple[list[str], dict[str, str]]
) -> None:
    options, env = place
    code, told = run(file, tmp_path / "out", *options, **env)
    assert code == 0, told
    assert len(here) == 3
    assert results(tmp_path / "out") == here


def test_trial_that_is_killed_is_started_again_and_goes_on(
    tmp_path: Path, file: Path, here: dict[str, list[Any]], place: tuple[list[str], dict[str, str]]
) -> None:
    options, env = place
    experiment = start(file, tmp_path / "out", *options, **env)
    at_work(tmp_path / "out").kill()
    code, told = ended(experiment)
    assert code == 0, told
    assert re.search(r"select/\S+: its process ended with -9: .*; started again", told)
    assert resumed(tmp_path / "out") == 1
    finals = {name: one for name, one in here.items() if name.startswith("final/")}
    assert {name: one for name, one in results(tmp_path / "out").items() if name in finals} == finals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_experiment_that_is_interrupted_or_killed_leaves_no_trial_and_goes_on(
    tmp_path: Path,
    file: Path,
    here: dict[str, list[Any]],
    place: tuple[list[str], dict[str, str]],
    number: signal.Signals,
) -> None:
    options, env = place
    out = tmp_path / "out"
    experiment = start(file, out, *options, **env)
    at_work(out)
    experiment.send_signal(number)
    code, told = ended(experiment)
    if number == signal.SIGINT:
        assert code == 130, told
        assert "stopped; called again, it goes on" in told
        assert trials(out) == []
    code, told = run(file, out, *options, **env)  # on Slurm the killed one's job is still at work
    assert code == 0, told
    assert results(out).keys() == here.keys()
    for cell in results(out).values():
        rounds = [one["round"] for one in cell if one["client"] == "server" and one["phase"] == "evaluate"]
        assert sorted(rounds) == list(range(ROUNDS + 1))


def test_machine_of_a_ray_cluster_that_dies_takes_no_trial_with_it(
    tmp_path: Path, file: Path, here: dict[str, list[Any]], cluster: tuple[str, dict[str, str]]
) -> None:
    address, env = cluster
    experiment = start(file, tmp_path / "out", "--on", "ray", "--address", address, **env)
    victim = at_work(tmp_path / "out")
    (raylet,) = [one for one in victim.parents() if one.name() == "raylet"]
    raylet.kill()
    code, told = ended(experiment)
    assert code == 0, told
    assert "; started again" in told
    assert results(tmp_path / "out").keys() == here.keys()


def test_ray_cluster_that_is_too_small_or_not_there_is_an_error_that_says_so(
    tmp_path: Path, file: Path, cluster: tuple[str, dict[str, str]]
) -> None:
    address, env = cluster
    code, told = run(file, tmp_path / "out", "--on", "ray", "--address", address, "--gpus-per-trial", "8", **env)
    assert code == 1
    assert "a trial needs 1 CPUs and 8 GPUs" in told
    assert "no machine of the Ray cluster has as many; its machines: 0 CPUs and 0 GPUs, 1 CPUs and 0 GPUs" in told
    (port,) = free_ports(1)
    code, told = run(file, tmp_path / "out", "--on", "ray", "--address", f"127.0.0.1:{port}")
    assert (code, "Connection refused" in told) == (1, True), told
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began, where = time.monotonic(), f"127.0.0.1:{silent.getsockname()[1]}"
        code, told = run(file, tmp_path / "out", "--on", "ray", "--address", where)
        assert (code, "no Ray cluster answers at --address" in told) == (1, True), told
        assert time.monotonic() < began + 150


def test_slurm_that_takes_no_such_trial_is_an_error_that_says_so(
    tmp_path: Path, file: Path, slurm: dict[str, str]
) -> None:
    for options, why in (
        (["--slurm", "partition=none"], "invalid partition"),
        (["--cpus-per-trial", "99"], "CPU count"),
    ):
        code, told = run(file, tmp_path / "out", "--on", "slurm", *options, **slurm)
        assert code == 1
        assert "sbatch took no trial" in told
        assert why in told
    code, told = run(file, tmp_path / "out", "--on", "slurm", PATH=str(Path(sys.executable).parent))
    assert (code, "sbatch is not on PATH" in told) == (1, True), told
