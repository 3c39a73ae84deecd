import os
from collections.abc import Iterator

import pytest
from flwr.supercore.task_identity import TaskIdentity

#: Files and folders of tests that each keep two cores busy with a dozen processes.
CROWDED = (
    "processes/test_life",
    "processes/test_across",
    "processes/test_failures",
    "processes/test_running",
    "faults/",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup``: the crowded ones one after the other, beside all others, which share a fork server."""
    for item in items:
        crowded = any(f"tests/{name}" in item.nodeid for name in CROWDED)
        item.add_marker(pytest.mark.xdist_group("crowded" if crowded else "others"))


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
