"""The federation of docker-compose.yml, brought up once, as a user whom no image knows."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import Engine

DEADLINE = float(os.environ.get("COMPOSE_DEADLINE", "1800"))  # seconds; building images takes the longest


def ours(folder: Path, uid: int) -> None:
    """Give a folder to the containers' user, as far as that is somebody else."""
    for path in (folder, *folder.rglob("*")):
        if path.stat().st_uid != uid:
            shutil.chown(path, uid, uid)


@pytest.fixture(scope="session")
def uid() -> int:
    """The calling user; nobody runs containers as root."""
    return os.getuid() or 54321


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, uid: int) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    ours(folder, uid)
    return folder


@pytest.fixture(scope="session")
def engine(runs: Path, uid: int) -> Iterator[Engine]:
    for parent in runs.parents[:2]:  # pytest's own folders are for the calling user alone
        parent.chmod(parent.stat().st_mode | 0o011)
    engine = Engine(f"fedspan-test-{os.getpid()}", f"{uid}:{uid}", runs, DEADLINE)
    engine.docker("info")
    engine.compose("build")
    try:
        engine.compose("up", "-d")
        yield engine
    finally:
        for container in engine.docker("ps", "-aq", "-f", f"network={engine.project}_federation").split():
            engine.docker("rm", "-f", container)
        engine.compose("down", "-v")
