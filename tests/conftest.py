import os
from collections.abc import Iterator

import pytest
from flwr.supercore.task_identity import TaskIdentity


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
