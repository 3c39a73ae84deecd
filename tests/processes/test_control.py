"""Runs on a real SuperLink, by its Control API: what is taken, refused, over and stopped."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListRunsRequest

from common.errors import LaunchError
from common.system.processes import ProcessGroup, Started
from deploy.sandbox.flower import wait_for
from server.superlink.bundle import bundle_digest, make_bundle
from server.superlink.control import control, is_over, start_run, stop_runs
from server.superlink.process import OwnSuperLink, sockets
from tests.harness.processes import ROOT, environment


@dataclass
class Idle:
    """A SuperLink on which a run stays pending, because nothing executes it."""

    home: Path
    link: OwnSuperLink
    process: Started

    def start(self, run_dir: Path | str, **config: str | int) -> int:
        return start_run(self.link, make_bundle(ROOT), {"run-dir": str(run_dir), **config})


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Idle]:
    home = tmp_path / "flwr"
    home.mkdir()
    with sockets(home) as folder, ProcessGroup(tmp_path / "logs") as group:
        link = OwnSuperLink(folder / "superlink", f"unix:{folder / 'fleet'}")
        env = {**environment(), "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
        process = group.start("superlink", [*link.command(home), "--isolation", "process"], env)
        wait_for(link.listens, 120)
        yield Idle(home, link, process)


def test_runs_start_and_stop(idle: Idle, tmp_path: Path) -> None:
    ours = [idle.start(tmp_path / "ours", federation="f.yaml", resume=True) for _ in range(2)]
    other = idle.start(tmp_path / "other")
    with control(idle.link) as client:
        listed = client.ListRuns(ListRunsRequest(run_id=ours[0])).run_dict[ours[0]]
    assert listed.fab_hash == bundle_digest(ROOT)
    assert (listed.override_config["federation"].string, listed.override_config["resume"].bool) == ("f.yaml", True)
    assert not any(is_over(idle.link, run) for run in (*ours, other))
    stop_runs(idle.link, tmp_path / "ours")
    assert [is_over(idle.link, run) for run in (*ours, other)] == [True, True, False]
    stop_runs(idle.link, tmp_path / "ours")  # nothing is left to stop

    with pytest.raises(LaunchError, match="refused: Invalid run configuration"):
        idle.start(tmp_path, speed=9)
    assert is_over(idle.link, 1), "a run that the SuperLink does not know began before its restart"

    idle.process.process.kill()
    with pytest.raises(LaunchError, match="cannot be reached"):
        is_over(idle.link, other)
