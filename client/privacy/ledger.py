"""A site's record of all data that left it: append-only, chained by hashes, written before the data leaves.

One JSON object per line. A line holds its number, the hash of the previous line, and at its end its own hash, the
SHA-256 of the line's text before it; so no line can be edited, inserted, removed or moved without a trace.
``FILE.head`` holds the number and hash of the last line, which reveals missing lines. An attacker who can write both
files can rewrite both; to detect that, another person notes a hash now and then, and ``--head`` looks for it in the
chain (decision 014).

An entry is on the disk before the data that it describes leaves. A crash may leave an incomplete line: that data did
not leave, and the next entry replaces the line and says so.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from common.errors import LedgerError
from common.system.files import flush, take, write_beside

Entry = dict[str, Any]
FIRST = "0" * 64  # previous hash in the first line
_END = re.compile(rb'\A(\{.*),"hash":"([0-9a-f]{64})"\}\n\Z', re.DOTALL)
_LOCK_SECONDS = 10.0  # another process holds the ledger for milliseconds


class Ledger:
    """The ledger of one site.

    Args:
        path: the file; made if needed, readable by its owner alone.
        each: called with every entry in order, also with those of earlier processes.
        site: whose ledger it is to be; None: anybody's.

    Attributes:
        lines: number of lines.
        head: hash of the last line.
        begun_by: the site that wrote the first; None while there is none.
    """

    def __init__(self, path: Path, each: Callable[[Entry], None] = lambda entry: None, site: str | None = None) -> None:
        self.path, self.lines, self.head = path, 0, FIRST
        self.begun_by: str | None = None
        self._each, self._site = each, site
        self._before = FIRST  # hash of the line before the last
        self._read = 0  # bytes of complete lines that were read
        self._file: IO[bytes] | None = None

    @contextlib.contextmanager
    def opened(self, *, write: bool = True) -> Iterator["Ledger"]:
        """Lock the ledger, read its new lines, and repair an incomplete last line.

        Lines that this process has read before are not read again; a new process, and ``verify``, read everything.

        Raises:
            LedgerError: it is damaged, it is another site's, or it cannot be read or written.
        """
        try:
            with _file(self.path, write=write) as self._file:
                torn = self._catch_up()
                self._compare_head()
                if self._site is not None and self.begun_by not in (None, self._site):
                    # The limits of both sites would be charged in one ledger, and neither site could tell.
                    raise LedgerError(
                        f"{self.path}: it is the ledger of {self.begun_by}; {self._site} needs one of its own, another "
                        "`ledger` in its site file"
                    )
                if torn and not write:
                    raise LedgerError(
                        f"{self.path}, line {self.lines + 1}: it has no end; a crash while it was written, of which "
                        "nothing left the site, or something was appended; the site mends it when it writes next"
                    )
                if torn:
                    os.truncate(self._file.fileno(), self._read)
                    self.append({"event": "mended", "bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()})
                yield self
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise LedgerError(f"{self.path}: the ledger cannot be {'written' if write else 'read'}: {reason}") from None
        finally:
            self._file = None

    def append(self, facts: Mapping[str, object]) -> None:
        """Write an entry to the disk; on failure the ledger is unchanged. Call within ``opened`` only.

        Raises:
            OSError: the entry cannot be written.
        """
        assert self._file is not None  # noqa: S101 - see above
        descriptor, head = self._file.fileno(), _head_of(self.path)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry: Entry = {"line": self.lines + 1, "time": now, **facts, "before": self.head}
        body = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()
        digest = hashlib.sha256(body).hexdigest()
        line = body[:-1] + f',"hash":"{digest}"}}\n'.encode()
        new = write_beside(head, f"{self.lines + 1} {digest}\n", 0o600)
        try:
            try:
                rest = line
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
                new.replace(head)
            except OSError:
                os.truncate(descriptor, self._read)  # on a full disk: remove the part of the line that was written
                raise
        finally:
            new.unlink(missing_ok=True)
        self._take(line, entry, digest)
        flush(self.path.parent)

    def _take(self, line: bytes, entry: Entry, digest: str) -> None:
        self.lines, self._before, self.head = self.lines + 1, self.head, digest
        self._read += len(line)
        if entry.get("event") == "begun":
            self.begun_by = entry.get("site")
        self._each(entry)

    def _catch_up(self) -> bytes:
        """Check and read the new lines; returns the bytes after the last complete line."""
        assert self._file is not None  # noqa: S101 - the caller has opened it
        if os.fstat(self._file.fileno()).st_size < self._read:
            raise LedgerError(f"{self.path}: it was cut off after this process had read {self.lines} lines of it")
        self._file.seek(self._read)
        for line in self._file:
            if not line.endswith(b"\n"):
                return line
            self._take(line, *_checked(line, self.lines + 1, self.head, self.path))
        return b""

    def _compare_head(self) -> None:
        """Raise a LedgerError unless the head file names the last line, or the one before it (a crash in between)."""
        file = _head_of(self.path)
        try:
            told = file.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            if self.lines > 1:
                raise LedgerError(f"{self.path}: it has {self.lines} lines, but {file.name} is missing") from None
            return
        if told in (f"{self.lines} {self.head}\n", f"{self.lines - 1} {self._before}\n"):
            return
        count = told.partition(" ")[0]
        if count.isdigit() and int(count) > self.lines:
            raise LedgerError(f"{self.path}: it ends with line {self.lines}, {file.name} tells of {count}: cut off")
        raise LedgerError(f"{self.path}, line {self.lines}: {file.name} tells of another line {count[:20]!r}")


def owner(path: Path) -> str | None:
    """The site that began a ledger, by its first line; None while nobody has, or when that line says nothing."""
    try:
        with path.open("rb") as file:
            entry = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return str(entry["site"]) if isinstance(entry, dict) and entry.get("event") == "begun" and "site" in entry else None


def verify(path: Path, head: str | None = None) -> Ledger:
    """Read a complete ledger and check every line.

    Args:
        path: the ledger's file.
        head: hash of a line, noted elsewhere, that must be in the ledger.

    Raises:
        LedgerError: a line is wrong; the text names the first wrong line and the mistake.
    """
    return read(path, lambda entry: None, head)


def read(path: Path, each: Callable[[Entry], None], head: str | None = None) -> Ledger:
    """Read and check like ``verify``; calls ``each`` with every entry."""
    hashes = {FIRST}

    def take(entry: Entry) -> None:
        hashes.add(entry["before"])
        each(entry)

    ledger = Ledger(path, take)
    with ledger.opened(write=False):
        pass
    if head is not None and head not in hashes | {ledger.head}:
        raise LedgerError(f"{path}: no line has the hash {head}: the ledger was made anew after that was noted")
    return ledger


def _checked(line: bytes, number: int, before: str, path: Path) -> tuple[Entry, str]:
    """A line's entry and hash.

    Raises:
        LedgerError: the line is not the one that follows ``before``.
    """
    where, found = f"{path}, line {number}", _END.match(line)
    if found is None:
        raise LedgerError(f"{where}: it is no entry of a ledger")
    body, digest = found[1] + b"}", found[2].decode()
    if hashlib.sha256(body).hexdigest() != digest:
        raise LedgerError(f"{where}: it was changed; its content does not have its hash")
    try:
        entry = dict(json.loads(body))
    except (ValueError, TypeError):
        raise LedgerError(f"{where}: it is no entry of a ledger") from None
    if entry.get("line") != number:
        raise LedgerError(f"{where}: it was written as line {entry.get('line')}; lines were removed, inserted or moved")
    if entry.get("before") != before:
        raise LedgerError(f"{where}: it does not follow the line before it, which was changed or exchanged")
    return entry, digest


@contextlib.contextmanager
def _file(path: Path, *, write: bool) -> Iterator[IO[bytes]]:
    """The file, locked against other processes."""
    if not path.exists() and _head_of(path).exists():
        raise LedgerError(f"{path}: it is gone, but {_head_of(path).name} is there; put it back, or take both away")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND if write else os.O_RDONLY, 0o600)
    with open(descriptor, "rb", closefd=True) as file:  # noqa: PTH123 - a descriptor
        if not take(descriptor, shared=not write, patience=_LOCK_SECONDS):
            raise LedgerError(f"{path}: another process holds the ledger for {_LOCK_SECONDS:g} s")
        yield file


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")
