"""A disk that fills: a named reason, and a state from which the run goes on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import QUIET, SIZES, Note
from tests.faults.test_kills import ROLORA
from tests.harness.processes import Federation
from tests.harness.results import same_result, trainings

RESUMED = "a named reason; --resume gives the result"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MB where the runs are."""
    folder = tmp_path / "runs"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all that is left of a disk."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as out:
        try:
            while out.write(os.urandom(65536)):
                pass
        except OSError:
            return file


@pytest.mark.long
@pytest.mark.timeout(900)
def test_full_disk_ends_the_run_with_its_name_and_loses_no_round(
    tmp_path: Path, small_disk: Path, injected: Note, straight: Callable[..., Path]
) -> None:
    file = make_federation(tmp_path, SIZES, strategy=ROLORA, rounds=4, evaluation=QUIET)
    with Federation(file) as federation:
        federation.wait_event("round_finished", round=2)
        filler = fill(small_disk)
        injected("server's disk fills", 1, RESUMED)
        assert federation.wait(400) == 1
    assert "No space left on device" in federation.log or "is full" in federation.log, federation.log
    assert "Traceback" not in federation.log
    filler.unlink()
    with Federation(file, "tiny", "--resume") as federation:
        assert federation.wait() == 0, federation.log
    same_result(federation.run, straight(ROLORA, 4), tmp_path)
    assert trainings(federation.run) == trainings(straight(ROLORA, 4))
