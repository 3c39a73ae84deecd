"""Locks that live no longer than the process that holds them: the kernel frees them, however it dies."""

import fcntl
import os
import time
from pathlib import Path


def hold(file: Path) -> int | None:
    """Lock a file until the returned descriptor is closed; None when another process holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + 1.0
    while not (ours := _take(descriptor, fcntl.LOCK_EX)) and time.monotonic() < deadline:
        time.sleep(0.05)  # whoever asks whether it is held, holds it for a moment
    if ours:
        return descriptor
    os.close(descriptor)
    return None


def is_held(file: Path) -> bool:
    """Whether a living process holds a file."""
    try:
        with file.open("rb") as lock:
            return not _take(lock.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
