import os
from collections.abc import Iterator

import pytest
from flwr.supercore.task_identity import TaskIdentity
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

#: Files and folders of tests that each keep two cores busy with a dozen processes.
CROWDED = (
    "processes/test_life",
    "processes/test_across",
    "processes/test_failures",
    "processes/test_running",
    "faults/",
)


class Lanes(LoadScopeScheduling):
    """Files of tests as they are; the crowded ones one after the other, beside all others.

    xdist's own groups do not work with pytest 9.2: they change a node id in a place that it no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        """The lane of a test: tests of one lane share a process."""
        return "crowded" if any(f"tests/{name}" in nodeid for name in CROWDED) else nodeid.split("::", 1)[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes | None:
    """With ``--dist loadgroup``, as `make test` runs federations."""
    return Lanes(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(autouse=True)
def _within_a_run() -> Iterator[None]:
    """What the process of a ServerApp knows and Message asks for."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


@pytest.fixture(autouse=True)
def _umask_as_before() -> Iterator[None]:
    """The programs narrow it for their process, which is the tests' when their main() is called."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
