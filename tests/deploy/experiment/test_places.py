"""Where trials run: what is tried again, what waits, what is refused, and what a machine must see."""

import argparse
import io
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config.federation import FederationConfig
from common.errors import ConfigError, FedSpanError, LaunchError, RunFolderError
from common.system.files import hold
from deploy.cli import main
from deploy.experiment import trial
from deploy.experiment.places import job, queue
from deploy.experiment.places.choose import add_places, choose
from deploy.experiment.places.cluster import job_of
from deploy.experiment.places.place import UNSEEN, End, Trial
from deploy.experiment.plan import Cell, Plan
from deploy.experiment.run import Experiment
from deploy.experiment.trial import LOCK, prepare, run_trial
from tests.deploy.experiment.test_experiment import make_experiment, plan, pretend

DIED = End(None, "machine 3 is gone")


class Stage:
    """A place where nothing runs: ``play`` says how each trial ends, by its folder's name and the number of its try."""

    slots = 2

    def __init__(self, out: Path, found: Plan, play: Callable[[str, int], End]) -> None:
        self._out, self._plan, self._play = out, found, play
        self._cells = {str(out / cell.folder): cell for cell in found.cells()}
        self.at_work: list[Trial] = []
        self.started: list[tuple[str, bool]] = []
        self.most = self.stopped = 0

    def check(self, federation: FederationConfig, summary: Path) -> None:
        assert summary.exists()

    def start(self, trial: Trial) -> None:
        self.at_work.append(trial)
        self.started.append((str(trial.folder.relative_to(self._out)), trial.resume))
        self.most = max(self.most, len(self.at_work))

    def ended(self, patience: float) -> Iterator[tuple[Trial, End]]:
        trial = self.at_work.pop(0)
        name = str(trial.folder.relative_to(self._out))
        end = self._play(name, sum(one == name for one, _ in self.started))
        cell = self._cells[str(trial.folder)]
        if end.code == 0:
            pretend(self._out, self._plan, cell, cell.learning_rate)
        elif end.died:
            (trial.folder / "run.json").write_text(json.dumps({"status": "running"}))
        yield trial, end

    def stop(self) -> None:
        self.at_work.clear()
        self.stopped += 1

    def close(self) -> None:
        self.stop()


def played(folder: Path, play: Callable[[str, int], End], tries: int = 2) -> tuple[Experiment, Stage, str, Plan]:
    """An experiment on such a place, and all that it printed."""
    found, out, told = plan(make_experiment(folder)), folder / "out", io.StringIO()
    out.mkdir()
    stage = Stage(out, found, play)
    experiment = Experiment(found, out, stage, tries, Console(file=told, soft_wrap=True, highlight=False))
    experiment.run()
    return experiment, stage, told.getvalue(), found


def test_trial_that_dies_is_tried_again_and_goes_on_where_its_bytes_are_not_compared(tmp_path: Path) -> None:
    experiment, stage, told, _ = played(tmp_path, lambda name, nth: DIED if nth == 1 else End(0, seconds=1.0))
    assert experiment.complete()
    assert stage.most == Stage.slots
    selection = [resume for name, resume in stage.started if name.startswith("select/")]
    assert selection == [False, False, True, True]
    assert [resume for name, resume in stage.started if name.startswith("final/")] == [False] * 4
    assert told.count("machine 3 is gone: ; started again") == 4


def test_trial_that_always_dies_is_given_up_and_one_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    def play(name: str, nth: int) -> End:
        if "lr0.001" in name:
            return End(1)
        return End(-9) if name.startswith("final/") else End(0)

    experiment, stage, told, _ = played(tmp_path, play)
    assert not experiment.complete()
    names = [name for name, _ in stage.started]
    assert sum("lr0.001" in name for name in names) == 1
    assert sum("seed1" in name for name in names) == 3
    assert told.count("its process ended with -9: ; started again") == 4
    assert "failed: its process ended with -9" in told


def test_machine_that_does_not_see_the_files_ends_the_experiment(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="node-7 does not see /data/rows; trials need the same files at the same abs"):
        played(tmp_path, lambda name, nth: End(UNSEEN, "node-7 does not see /data/rows"))


def test_cell_on_which_an_earlier_call_is_at_work_is_waited_for_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_experiment(tmp_path)
    found, out, told = plan(file), tmp_path / "out", io.StringIO()
    held = next(found.cells())
    folder = out / held.folder
    folder.mkdir(parents=True)
    lock, waits = hold(folder / LOCK), 0
    assert lock is not None

    def sleep(seconds: float) -> None:
        nonlocal waits, lock
        waits += 1
        if lock is not None:  # now the other process comes to its end
            pretend(out, found, held, 0.5)
            os.close(lock)
            lock = None

    monkeypatch.setattr(queue.time, "sleep", sleep)
    stage = Stage(out, found, lambda name, nth: End(0))
    experiment = Experiment(found, out, stage, 0, Console(file=told, soft_wrap=True, highlight=False))
    experiment.run()
    assert experiment.complete()
    assert waits == 1
    assert held.folder not in [name for name, _ in stage.started]
    assert told.getvalue().count(f"{held.folder}: an earlier process is at work on it") == 1


def one_cell(folder: Path) -> tuple[Plan, Cell, Path]:
    found = plan(make_experiment(folder))
    cell = next(found.cells())
    return found, cell, folder / cell.folder


def test_attempt_that_starts_late_ends_before_it_touches_what_a_later_one_has_begun(tmp_path: Path) -> None:
    found, cell, folder = one_cell(tmp_path)
    first = prepare(folder, found.federation(cell), found.facts(cell))
    second = prepare(folder, found.federation(cell), found.facts(cell))
    assert first is not None
    assert second is not None
    before = {file: file.read_bytes() for file in folder.iterdir()}
    command = [sys.executable, "-P", trial.__file__, str(folder), first[0], "new", "1"]
    code, _, _ = job.work(command, {"PYTHONPATH": str(Path.cwd())}, {}, str(tmp_path / "log"), UNSEEN)
    assert code == 1
    assert "a later call of the experiment has begun this cell anew" in (tmp_path / "log").read_text()
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_two_processes_never_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cell, folder = one_cell(tmp_path)
    prepared = prepare(folder, found.federation(cell), found.facts(cell))
    assert prepared is not None
    lock = hold(folder / LOCK)
    assert lock is not None
    monkeypatch.setattr("deploy.experiment.trial._PATIENCE", 0.0)
    monkeypatch.setattr("deploy.experiment.trial.die_with_parent", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        with pytest.raises(SystemExit, match="another process is at work on this cell"):
            run_trial(folder, prepared[0], False, 1)
        assert prepare(folder, found.federation(cell), found.facts(cell)) is None
    finally:
        os.close(lock)
    assert prepare(folder, found.federation(cell), found.facts(cell)) is not None


@pytest.mark.parametrize("name", ["model", "site-a.yaml", "site-a.jsonl", "server.jsonl", LOCK])
@pytest.mark.parametrize("how", ["absent", "other"])
def test_machine_names_the_first_path_that_it_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    found, cell, folder = one_cell(tmp_path)
    prepared = prepare(folder, found.federation(cell), found.facts(cell))
    assert prepared is not None
    command, env, sees, log, refused = job_of(Trial(folder, *prepared, found.federation(cell)), 1)
    assert job.unseen(sees) is None
    path = folder / name if name == LOCK else tmp_path / name
    if how == "absent":
        path.rename(tmp_path / "elsewhere")
    elif path.is_dir():
        (path / "more").touch()
    else:
        path.write_bytes(path.read_bytes().replace(b"e", b"E") + b"0")
    monkeypatch.setattr(job, "_PATIENCE", 0.0)
    code, why, _ = job.work(command, env, sees, log, refused)
    assert code == UNSEEN
    assert why.endswith(f" {'does not see' if how == 'absent' else 'sees something else at'} {path}")


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_places(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        (["--address", "auto"], ConfigError, "--address needs --on ray"),
        (["--on", "slurm", "--address", "auto"], ConfigError, "--address needs --on ray"),
        (["--on", "ray", "--slurm", "partition=gpu"], ConfigError, "--slurm needs --on slurm"),
        (["--gpus-per-trial", "1"], ConfigError, "--gpus-per-trial needs --on ray or slurm"),
        (["--on", "ray"], ConfigError, r"run: pip install 'fedspan\[ray\]'"),
        (["--on", "slurm"], ConfigError, r"run: pip install 'fedspan\[slurm\]'"),
        (["--on", "slurm", "--gpus-per-trial", "0.5"], ConfigError, "Slurm gives whole GPUs"),
        (["--on", "slurm", "--slurm", "time=1", "--slurm=--time=2"], ConfigError, "--slurm time is given 2 times"),
    ],
)
def test_places_that_cannot_be_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kind: type[FedSpanError], told: str
) -> None:
    for package in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(kind, match=told):
        choose(options(*words), tmp_path)


def test_threads_are_those_that_are_asked_for(tmp_path: Path) -> None:
    def threads(*words: str) -> Any:
        return choose(options(*words), tmp_path)._threads  # type: ignore[attr-defined]

    cores = len(os.sched_getaffinity(0))
    assert threads() == cores
    assert threads("--jobs", str(2 * cores)) == 1
    assert threads("--jobs", "2", "--cpus-per-trial", "3") == 3


def test_second_experiment_in_a_folder_is_refused_before_it_asks_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = make_experiment(tmp_path), tmp_path / "out"
    out.mkdir()
    lock = hold(out / ".lock")
    assert lock is not None
    monkeypatch.setitem(sys.modules, "ray", None)
    try:
        assert main(["experiment", str(file), "--out", str(out), "--on", "ray"]) == RunFolderError.exit_code
    finally:
        os.close(lock)
    assert "another experiment is at work in this folder" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "log"), [(3, "log"), (None, "none/log")])
def test_job_tells_its_end_in_a_file_that_is_read_without_unpickling(
    tmp_path: Path, code: int | None, log: str
) -> None:
    told, command = tmp_path / "told.json", [sys.executable, "-c", "raise SystemExit(3)"]
    job.work_and_tell(str(told), command, {}, {}, str(tmp_path / log), UNSEEN)
    found = End(*json.loads(told.read_text()))
    assert (found.code, found.died) == (code, True)
    assert socket.gethostname() in found.said
