"""Another account of this machine."""

import os
import traceback
from collections.abc import Callable

import pytest

#: No account that tests run as: nobody's number on most systems, with no group in common with root.
OTHER = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another account's place")


def as_other_account(work: Callable[[], object]) -> str:
    """What ``work`` returns, as text, in a process of the other account; or the name and text of what it raised.

    The process is a copy of this one, so it need not find Python or any module on the disk.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(OTHER, OTHER, OTHER)
            os.setresuid(OTHER, OTHER, OTHER)
            try:
                said = f"returned {work()!r}"
            except Exception as error:  # noqa: BLE001 - told to the test
                said = "".join(traceback.format_exception_only(error)).strip()
            os.write(write, said.encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text
