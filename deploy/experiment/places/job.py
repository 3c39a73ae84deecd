"""The part of a trial that runs on another machine. The cluster sends it there, so it imports Python's own alone.

A trial finds its files at the same absolute paths everywhere. A fingerprint for each path tells whether the machine
sees the same one: a file's size or, of a small file, its content; a folder's names and sizes.
"""

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMALL = 1 << 20  # bytes
_ABSENT = "absent"
_PATIENCE = 10.0  # seconds in which a shared file system shows here what another machine has just written


def fingerprint(path: str) -> str:
    """The content of a path, as a digest or size; the entries of folders inside a folder are not looked at."""
    found = Path(path)
    try:
        if found.is_dir():
            entries = sorted((one.name, one.stat().st_size if one.is_file() else 0) for one in found.iterdir())
            return hashlib.sha256(repr(entries).encode()).hexdigest()
        size = found.stat().st_size
        return hashlib.sha256(found.read_bytes()).hexdigest() if size <= _SMALL else f"{size} bytes"
    except OSError:
        return _ABSENT


def unseen(sees: Mapping[str, str]) -> str | None:
    """The first path that this machine does not see as the experiment does, in words; None: it sees all of them."""
    deadline = time.monotonic() + _PATIENCE
    for path, expected in sees.items():
        while (found := fingerprint(path)) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
        if found != expected:
            what = "does not see" if found == _ABSENT else "sees something else at"
            return f"{socket.gethostname()} {what} {path}"
    return None


def work(
    command: Sequence[str], env: Mapping[str, str], sees: Mapping[str, str], log: str, refused: int
) -> tuple[int, str, float]:
    """Run a trial's program on this machine.

    Args:
        command: the program, which is given this process's id as its last argument.
        env: environment variables beside those of this machine.
        sees: see ``unseen``.
        log: file for what the program prints before it writes there itself.
        refused: the exit code when this machine does not see the files.

    Returns:
        The exit code, this machine's name or why it does not run the trial, and the seconds at work.
    """
    began = time.monotonic()
    if (why := unseen(sees)) is not None:
        return refused, why, 0.0
    with Path(log).open("ab") as out:
        parent = str(os.getpid())
        done = subprocess.run(  # noqa: S603 - our own program
            [*command, parent], env={**os.environ, **env}, stdout=out, stderr=out, stdin=subprocess.DEVNULL, check=False
        )
    return done.returncode, socket.gethostname(), time.monotonic() - began


def work_and_tell(told: str, *arguments: Any) -> None:  # noqa: ANN401
    """Run a trial's program as ``work`` does, and write what that returns into the file ``told``, as a JSON list."""
    try:
        result: tuple[int | None, str, float | None] = work(*arguments)
    except OSError as error:
        result = None, f"{socket.gethostname()}: {error.strerror}", None
    file = Path(told)
    written = file.with_suffix(".new")
    written.write_text(json.dumps(result))
    written.replace(file)
