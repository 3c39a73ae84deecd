"""What the operator is told of a run: its state, rounds and sites, and how it is stopped."""

import contextlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message, MetricRecord
from rich.console import Console

from common.errors import FederationError, LaunchError, RunFailed, RunFolderError
from common.system.files import hold
from deploy.cli import main
from server.loop.checkpoint import newest
from server.operate import status
from server.run.folder import read_lines
from server.run.state import read_state
from server.run.supervisor_lock import (
    _FILE as SUPERVISOR,
    _LOCK as LOCK,
    Interrupted,
    Supervisor,
    stop,
    supervising,
    supervisor_of,
)
from tests.harness import fake_sites
from tests.harness.fake_sites import Grid, Site, run
from tests.harness.sample_run import ROUNDS, SITES, begin, completed, play_round


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["status", *arguments]) == 0
    return capsys.readouterr().out


def test_finished_run_is_told_with_its_rounds_and_sites(tmp_path: Path) -> None:
    seen = read_state(completed(tmp_path / "run"))
    assert (seen.name, seen.state, seen.strategy, seen.round, seen.rounds) == ("run", "completed", "fedftg", 4, ROUNDS)
    assert [line.round for line in seen.finished_rounds] == [1, 2, 3, 4]
    assert [(line.sites, line.asked) for line in seen.finished_rounds] == [(3, 3), (3, 3), (2, 3), (3, 3)]
    assert seen.bytes_down == 106_200_000 * 3 * 4
    assert seen.bytes_up == 106_200_000 * (3 * 4 - 1)
    assert seen.loss == pytest.approx(3.91 - 1.3 * (1 - 0.5**4))
    assert seen.finished_rounds[0].scores["loss"] == pytest.approx(3.91 - 1.3 * 0.5)
    assert seen.eta is None
    sites = {site.site: site for site in seen.sites}
    assert {name: (s.rows, s.held_out) for name, s in sites.items() if name != "server"} == {
        name: (rows, held_out) for name, (rows, held_out, _) in SITES.items()
    }
    assert (sites["site-c"].rounds, sites["site-c"].bytes_up) == (3, 3 * 106_200_000)
    assert sites["site-a"].seconds == 4 * 11.0
    assert [problem.who for problem in seen.problems] == ["site-c"]


def test_terminal_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completed(tmp_path / "run")
    begin(tmp_path / "begun").close()
    text = shown(capsys, "--runs", str(tmp_path))
    assert ["run", "completed", "4", "of", "4", "fedftg"] in [line.split()[:6] for line in text.splitlines()]
    assert "begun: its processes ended without a word" in text
    one = shown(capsys, "--runs", str(tmp_path), "run")
    assert "site-c: CUDA out of memory in round 3" in one
    assert "1.3 GB down" in one
    assert ["site-b", "unknown"] in [line.split()[:2] for line in one.splitlines()]
    told = json.loads(shown(capsys, "--runs", str(tmp_path), "--json"))
    assert {run["name"]: run["state"] for run in told["runs"]} == {"run": "completed", "begun": "dead"}
    told = json.loads(shown(capsys, "--runs", str(tmp_path), "run", "--json"))
    assert told["bytes_up"] == 106_200_000 * 11
    assert len(told["sites"]) == len(SITES)


def test_narrow_terminal_cuts_nothing_off(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(status.show_one(read_state(completed(tmp_path / "run"))))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert "site link doing last seen FedSpan device".split() in lines
    assert ["site-a", "2,210", "245", "4", "0", "424.8", "MB", "424.8", "MB", "44.0"] in lines
    assert not any("…" in word for line in lines for word in line)


def attend(run_dir: Path, end: Exception) -> None:
    """Begin a run that ends with its supervisor."""
    with contextlib.suppress(type(end)), supervising(run_dir):
        begin(run_dir).close()
        raise end


def test_states_of_a_run(tmp_path: Path) -> None:
    def state(name: str) -> tuple[str, str | None]:
        seen = read_state(tmp_path / name)
        return seen.state, seen.reason

    with pytest.raises(RunFolderError, match="holds no run"):
        state("none")
    with supervising(tmp_path / "x"):
        assert state("x") == ("starting", None)
        folder = begin(tmp_path / "x")
        play_round(folder, 1)
        assert state("x") == ("running", None)
        (began,) = [e["time"] for e in read_lines(tmp_path / "x" / "events.jsonl") if e["event"] == "round_started"]
        seen = read_state(tmp_path / "x", now=began + 80.0)
        assert seen.eta == pytest.approx(3 * 80.0)  # three rounds are left
        assert {site.connection for site in seen.sites} == {"up"}
        folder.close()
        assert state("x") == ("starting", None)  # again
    assert supervisor_of(tmp_path / "x") is not None
    attend(tmp_path / "stopped", Interrupted("SIGTERM"))
    assert state("stopped") == ("interrupted", "SIGTERM")
    assert str(read_state(tmp_path / "stopped").to_go_on).endswith(" --resume")
    attend(tmp_path / "gone", RunFailed("the server died 4 times"))
    assert state("gone") == ("failed", "the server died 4 times")
    folder = begin(tmp_path / "failed")
    folder.fail("too few sites", "FederationError")
    assert state("failed") == ("running", None)  # as long as its server holds the folder
    folder.close()
    assert state("failed") == ("failed", "too few sites")
    folder = begin(tmp_path / "flower")
    folder.interrupt()
    folder.close()
    assert state("flower")[0] == "interrupted"


def test_run_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completed(tmp_path / "good")
    (completed(tmp_path / "bad") / "events.jsonl").write_text("{\n")
    text = shown(capsys, "--runs", str(tmp_path))
    assert "good  completed" in " ".join(text.split(" "))
    assert "events.jsonl, line 1: not valid JSON" in text
    assert main(["status", "--runs", str(tmp_path), "bad"]) == 2
    assert "events.jsonl, line 1" in capsys.readouterr().err


class Refused(Site):
    """A site that declares other rows than it trains on, in some rounds."""

    def __init__(self, number: int, bad: set[int]) -> None:
        super().__init__(number)
        self._bad = bad

    def reply(self, message: Message) -> Message:
        reply = super().reply(message)
        config: Any = message.content["config"]
        if config.get("server-round") in self._bad and "arrays" in reply.content:
            reply.content["metrics"] = MetricRecord({"num-examples": 99})
        return reply


@pytest.mark.parametrize("bad", [{1, 2}, {2, 3, 4, 5}, {1, 3}, set()])
def test_refusals_in_a_row_are_those_that_the_server_counts(tmp_path: Path, bad: set[int]) -> None:
    sites = [Site(1), Site(2), Refused(3, bad)]
    run(tmp_path, sites, 5, cohort={"min_clients": 2, "round_deadline": 30.0})
    checkpoint = newest(tmp_path / "run", pytest.fail)
    assert checkpoint is not None
    seen = {site.site: site for site in read_state(tmp_path / "run").sites}
    assert {name: site.refusals for name, site in seen.items() if site.refusals} == checkpoint.refusals
    assert (seen["site-3"].left_out is not None) == (len(bad) > 3)


def test_refusals_of_a_round_that_is_done_again_count_once(tmp_path: Path) -> None:
    cohort = {"min_clients": 2, "round_deadline": 30.0}
    with pytest.raises(FederationError, match="round 4: 1 valid updates, 2 needed"):
        run(tmp_path, [Site(1), Refused(2, {4}), Refused(3, {3, 4})], 5, cohort=cohort)
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "event": "resumed", "round": 3}\n')  # as the ServerApp does
    run(tmp_path, [Site(1), Site(2), Refused(3, {4, 5})], 5, resume=True, cohort=cohort)
    (site,) = [site for site in read_state(tmp_path / "run").sites if site.refusals]
    assert (site.site, site.refusals) == ("site-3", 3)  # rounds 3, 4 and 5
    assert str(site.left_out).startswith("site-3: left out after 3 refused updates or errors in a row")


def test_sites_that_go_and_come_are_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Site 3 is away while round 2 waits for it; site 2 leaves for good."""
    sites = [Site(1), Site(2), Site(3)]
    looks = 0

    def connected(grid: Grid) -> list[int]:
        nonlocal looks
        rounds = max((number for number, _ in sites[0].sent), default=0)
        looks += rounds >= 2
        gone = ({3} if 0 < looks < 4 else set()) | ({2} if looks > 1 else set())
        return [number for number in grid.sites if number not in gone]

    def late(number: int, message: Message) -> int:
        config: Any = message.content["config"]
        return 3 if number == 1 and config.get("server-round") == 2 else 0

    monkeypatch.setattr(fake_sites.Grid, "get_node_ids", connected)
    run(tmp_path, sites, 3, late=late, cohort={"min_clients": 1, "round_deadline": 30.0})
    links = [
        (e["event"], e["client"]) for e in read_lines(tmp_path / "run" / "events.jsonl") if "nnected" in e["event"]
    ]
    assert links == [
        ("client_disconnected", "site-3"),
        ("client_disconnected", "site-2"),
        ("client_connected", "site-3"),
    ]
    lock = hold(tmp_path / "run" / ".lock")  # as a server at work does
    assert lock is not None
    seen = {site.site: site for site in read_state(tmp_path / "run").sites}
    os.close(lock)
    assert {name: site.connection for name, site in seen.items()} == {"site-1": "up", "site-2": "down", "site-3": "up"}


def test_site_tells_its_version(tmp_path: Path) -> None:
    sites = [Site(1), Site(2)]
    sites[1].says = {"version": "0.0.9"}
    run(tmp_path, sites, 1)
    assert {site.site: site.version for site in read_state(tmp_path / "run").sites} == {
        "site-1": "1",
        "site-2": "0.0.9",
    }


def test_server_that_fails_leaves_a_state(tmp_path: Path) -> None:
    with pytest.raises(FederationError):
        run(tmp_path, [Refused(1, {1})], 1, cohort={"min_clients": 1, "round_deadline": 30.0})
    assert read_state(tmp_path / "run").problems[0].what == "update refused"


ATTEND = """
import signal, sys, time
from pathlib import Path
from server.run.supervisor_lock import supervising
def end(number, frame):
    if sys.argv[2] == "obeys":
        raise SystemExit
signal.signal(signal.SIGTERM, end)
with supervising(Path(sys.argv[1])):
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


@pytest.fixture
def supervisor(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", ATTEND, str(tmp_path / "run"), request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("supervisor", ["obeys"], indirect=True)
def test_stop_ends_the_supervisor_and_waits_for_it(
    tmp_path: Path, supervisor: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "run").close()
    with (
        pytest.raises(RunFolderError, match="another supervisor looks after this run"),
        supervising(tmp_path / "run"),
    ):
        pass
    assert main(["stop", "run", "--runs", str(tmp_path)]) == 0
    assert "run is stopped after round 0" in capsys.readouterr().out
    assert supervisor.wait(10) == 0
    assert main(["stop", "run", "--runs", str(tmp_path)]) == 0  # nothing is left to stop
    assert "run is not running" in capsys.readouterr().out


@pytest.mark.parametrize("supervisor", ["ignores"], indirect=True)
def test_supervisor_that_does_not_end_in_time_is_named(
    tmp_path: Path, supervisor: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", "run", "--runs", str(tmp_path), "--deadline", "0.5"]) == 1
    assert f"process {supervisor.pid} has not ended within 0.5 seconds" in capsys.readouterr().err
    assert supervisor.poll() is None


@pytest.mark.parametrize("change", [{"born": 1.0}, {"host": "elsewhere"}])
def test_process_that_only_has_the_supervisors_number_is_not_touched(tmp_path: Path, change: dict[str, object]) -> None:
    begin(tmp_path / "run").close()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        born = psutil.Process(stranger.pid).create_time()
        noted = Supervisor(pid=stranger.pid, born=born, host=platform.node(), command=[], folder="/")
        (tmp_path / "run" / SUPERVISOR).write_text(noted.model_copy(update=change).model_dump_json())
        assert not stop(tmp_path / "run", 1.0)  # nobody holds the run
        lock = hold(tmp_path / "run" / LOCK)
        assert lock is not None
        try:
            with pytest.raises(LaunchError, match=f"its supervisor is process {stranger.pid} on .*; stop it there"):
                stop(tmp_path / "run", 1.0)
        finally:
            os.close(lock)
        assert stranger.poll() is None
        stranger.kill()


def test_server_without_a_supervisor_is_left_to_flower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begin(tmp_path / "run")
    assert main(["stop", "run", "--runs", str(tmp_path)]) == 1
    assert "stop it with `flwr stop`" in capsys.readouterr().err
    folder.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs", "/none"], "/none does not exist; --runs names the folder of all runs"),
        (["--runs", "/none", "x"], "/none/x holds no run"),
        (["--watch", "0"], "'0'; allowed: 0.1 to 86400 seconds"),
    ],
)
def test_mistakes_are_told(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_run_is_watched_on_the_terminal_until_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    completed(tmp_path / "run")
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", pause)
    assert main(["watch", "run", "--runs", str(tmp_path)]) == 0
    assert looks == [2.0] * 3
    assert capsys.readouterr().out.count("run  completed  round 4 of 4") == 3
