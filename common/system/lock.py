"""Locks that live no longer than the process that holds them: the kernel frees them, however it dies."""

import fcntl
import os
import time
from pathlib import Path


def hold(file: Path, patience: float = 1.0) -> int | None:
    """Lock a file, which is made when there is none, until the returned descriptor is closed.

    Args:
        file: to be locked.
        patience: seconds to wait for it. Whoever asks whether a file is held, holds it for a moment.

    Returns:
        None when another process holds it.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    if take(descriptor, patience=patience):
        return descriptor
    os.close(descriptor)
    return None


def take(descriptor: int, *, shared: bool = False, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed; ``shared``: beside others who read. False when another process holds it."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def is_held(file: Path) -> bool:
    """Whether a living process holds a file."""
    try:
        with file.open("rb") as lock:
            return not take(lock.fileno(), shared=True)
    except FileNotFoundError:
        return False
