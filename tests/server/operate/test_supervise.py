"""A SuperLink that dies while a run is submitted is started again, as often as is allowed."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.errors import LaunchError, RunFailed
from common.system.processes import ProcessGroup
from server.operate.supervise import Supervised
from server.superlink import control
from server.superlink.process import OwnSuperLink
from tests.harness.sample_run import federation

# Listens at both sockets; answers HTTP 500, or is gone at the first word.
PROGRAM = """
import os, pathlib, socket, sys
control, fleet = (socket.socket(socket.AF_UNIX) for _ in range(2))
for listening, path in ((control, sys.argv[2]), (fleet, sys.argv[3])):
    pathlib.Path(path).unlink(missing_ok=True)
    listening.bind(path)
    listening.listen()
while True:
    caller, _ = control.accept()
    if caller.recv(9) and sys.argv[1] == "dies":
        os._exit(9)
    if caller.recv(99):
        caller.sendall(b"HTTP/1.1 500 No\\r\\ncontent-length: 0\\r\\n\\r\\n")
        while caller.recv(1 << 16):
            pass
    caller.close()
"""


#: httpcore leaves the socket of a call that finds nobody to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@dataclass(frozen=True)
class Fake(OwnSuperLink):
    """A program in the SuperLink's place."""

    does: str = "dies"

    def command(self, home: Path) -> list[str]:
        return [sys.executable, "-c", PROGRAM, self.does, str(self.socket), self.fleet.removeprefix("unix:")]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ProcessGroup]:
    with ProcessGroup(tmp_path / "logs", grace=0.0) as group:
        yield group


def supervised(tmp_path: Path, group: ProcessGroup, does: str, told: list[str]) -> Supervised:
    env = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr")}
    fake = Fake(tmp_path / "control", f"unix:{tmp_path / 'fleet'}", does=does)
    run = Supervised(resolved(federation(), tmp_path / "mine.yaml"), tmp_path, group, fake, env, told.append, tries=2)
    run.start_superlink()
    return run


def test_death_during_the_submission_is_a_death_like_others(tmp_path: Path, group: ProcessGroup) -> None:
    told: list[str] = []
    run = supervised(tmp_path, group, "dies", told)
    run.submit(resume=False)
    for _ in range(2):
        assert not run.finished()
    with pytest.raises(RunFailed, match="the SuperLink died 3 times without finishing another round"):
        run.finished()
    assert [line.rpartition(" (")[2] for line in told] == ["try 1 of 2)", "try 2 of 2)"]


def test_refusal_of_a_living_superlink_ends_the_run(tmp_path: Path, group: ProcessGroup) -> None:
    run = supervised(tmp_path, group, "lives", [])
    with pytest.raises(LaunchError, match="refused: HTTP 500"):
        run.submit(resume=False)


def test_server_reads_what_its_supervisor_has_read(
    tmp_path: Path, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's own file may change, or go, while a run goes on and is submitted again."""
    sent: list[dict[str, object]] = []
    monkeypatch.setattr(control, "start_run", lambda link, bundle, config: sent.append(config) or len(sent))
    run = supervised(tmp_path, group, "lives", [])
    for _ in range(2):
        run.submit(resume=False)
        file = Path(str(sent[-1]["federation"]))
        read = load(file, FederationConfig)
        assert file.parent == tmp_path
        assert read == resolved(federation(), tmp_path / "mine.yaml")
        assert resolved(read, file) == read
        file.unlink()
