"""Files and folders that appear complete or not at all, also on a full disk and when power fails.

The content goes into a temporary file beside the final one, is flushed to the disk, and a rename puts it in place.
Errors are OSErrors that name the file. The kernel frees a lock when the process that holds it ends, however it dies.
"""

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_LFS = b"version https://git-lfs.github.com/spec/"
_FLUSHES = 32  # at a time: a disk confirms many files at once (10,000 small ones in 1.5 s, one by one in 42 s)


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """Replace a file's content completely, or leave the file unchanged.

    Args:
        path: the file; its folder exists.
        content: bytes, or text, which is written as UTF-8.
        mode: the file's mode from its first byte on, less the process's umask; 0o600 for secrets.
        durable: flush to the disk. False for files that are rewritten all the time: readers never see half of such a
            file, but a power failure may leave it empty.

    Raises:
        OSError: the file cannot be written.
    """
    with _naming(path):
        temporary = write_beside(path, content, mode, durable=durable)
        try:
            temporary.replace(path)
            if durable:
                flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_beside(path: Path, content: str | bytes, mode: int = 0o644, *, durable: bool = True) -> Path:
    """Write the temporary file that is to replace ``path``, and return it; see ``write_atomically``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # left by a killed process: in a container the next process has the same id
    write_new(temporary, content, mode, durable=durable)
    return temporary


def write_new(path: Path, content: str | bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """Write a file that does not exist yet; if two processes try, one fails; see ``write_atomically``.

    Raises:
        FileExistsError: the file exists.
        OSError: the file cannot be written; no part of it is left.
    """
    data = content.encode() if isinstance(content, str) else content
    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file that a process of ours keeps; empty when there is none, or it cannot be read."""
    try:
        return as_object(file.read_bytes())
    except (OSError, ValueError):
        return {}


def as_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is too deep") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


@contextlib.contextmanager
def built(folder: Path) -> Iterator[Path]:
    """An empty folder to write into. It takes the place of ``folder`` at the end, unless something was raised.

    Raises:
        OSError: the folder cannot be written; its old content is unchanged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()  # unlike the folder around it, others may read it
        yield new
        with ThreadPoolExecutor(_FLUSHES) as pool:
            list(pool.map(flush, (*new.rglob("*"), new)))
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    flush(folder.parent)


def keep_private() -> None:
    """Set the umask so that only this account may read new files (0600) and folders (0700) of this process."""
    os.umask(0o077)


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter; an existing folder of this account gets the same mode.

    Raises:
        OSError: the folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid == os.geteuid():  # a volume mounted in a container may belong to another account
        folder.chmod(0o700)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError: the one of a write, on a full disk, names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file only says where Git LFS keeps the content that it should have."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_LFS)) == _LFS


def hold(file: Path, patience: float = 1.0) -> int | None:
    """Lock a file, which is made if needed, until the returned descriptor is closed.

    Args:
        file: the file to lock.
        patience: seconds to wait for the lock: ``is_held`` of another process holds the lock for a moment.

    Returns:
        The descriptor; None when another process holds the lock.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    if take(descriptor, patience=patience):
        return descriptor
    os.close(descriptor)
    return None


def take(descriptor: int, *, shared: bool = False, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed (``shared``: a read lock). False when another process holds the lock."""
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
    """Whether a living process holds the lock on a file."""
    try:
        with file.open("rb") as lock:
            return not take(lock.fileno(), shared=True)
    except FileNotFoundError:
        return False
