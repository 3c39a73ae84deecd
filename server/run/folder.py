"""The folder of one run: everything that a person, a program or the launcher reads about the run.

    federation.yaml   the federation file with all defaults and absolute paths
    run.json          status, reason of a failure, versions, machine, digests
    signatures.json   signatures of the app bundle, if the supervisor was given some
    security.json     digests of code and settings, and how sites connect
    nodes.json        the site behind each SuperNode's key, if the supervisor was given a register of sites
    events.jsonl      events, one line each, as they happen
    metrics.jsonl     numbers: one record per round, site and phase
    checkpoints/      the state after the last rounds, to resume from
    samples.json      the server's own questions, answered before and after
    tensorboard/      the same numbers for TensorBoard; wandb/ for W&B, if the federation file wants it
    model/            the fine-tuned result: the last round's model
    best/             the best round's, if that is another
    report.html       the report: one page about the run
    supervisor.json   the process that supervises the run (``server.run.supervisor_lock``)

The supervisor writes supervisor.json, signatures.json, security.json, nodes.json, report.html, and federation.yaml,
which the ServerApp reads. The ServerApp writes all other files. A file appears complete or not at all; lines are
flushed as soon as they are written.
"""

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from common.config.federation import FederationConfig
from common.errors import RunFolderError
from common.system.files import as_object, hold, is_held, write_atomically
from common.system.machine import machine, versions
from common.text import one_line
from server.run.events import log_event, new_event
from server.tracking.trackers import Trackers, flat

FEDERATION = "federation.yaml"
CHECKPOINTS = "checkpoints"  # see server.loop.checkpoint
#: A folder that holds any of these holds a run, or the rest of one.
_RESULTS = ("run.json", "events.jsonl", "metrics.jsonl", "samples.json", "model", "best", "report.html", CHECKPOINTS)
_LOCK = ".lock"
_MAY_CHANGE = ("local", "delivery", "tracking")  # sections that may be others when a run is resumed


class RunFolder:
    """Writes a run's folder, which is locked until it is closed. Make one with ``create`` or ``reopen``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lock = hold(path / _LOCK)
        if lock is None:
            raise RunFolderError(f"{path}: another server is at work on this run")
        self._lock = lock
        self._started = time.time()
        self._run: dict[str, Any] = {}
        self._trackers: Trackers | None = None
        self.evaluations: dict[int, dict[str, Any]] = {}  # metrics by round and site, until the round is judged

    @classmethod
    def create(cls, path: Path, federation: FederationConfig) -> "RunFolder":
        """Make the folder of a new run.

        Args:
            path: the folder; it may exist as long as it holds no run.
            federation: the federation file's content, with absolute paths.

        Raises:
            RunFolderError: the folder already holds a run, or cannot be written.
        """
        refuse_existing(path)
        file = write_federation(path, federation)
        try:
            folder = cls(path)
        except OSError as error:
            raise RunFolderError(f"run folder {path} cannot be written: {error.strerror or error}") from None
        folder.model_info(
            {
                "status": "running",
                "name": federation.name,
                "started": folder._started,
                "federation_digest": hashlib.sha256(file.read_bytes()).hexdigest(),
                "versions": versions(),
                "machine": machine(),
            }
        )
        folder._track(federation)
        return folder

    @classmethod
    def reopen(cls, path: Path, federation: FederationConfig) -> "RunFolder":
        """Open the folder of a run that is to be resumed.

        Args:
            path: the run's folder.
            federation: the federation file's content, with absolute paths; see ``check_resumable``.

        Raises:
            RunFolderError: there is no run to resume, or the federation file has changed; the text names the change.
        """
        check_resumable(path, federation)
        folder = cls(path)  # which locks the folder
        folder._run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        folder.model_info({"status": "running", "reason": None})
        folder._track(federation)
        return folder

    def close(self) -> None:
        """Release the folder's lock, so that another server may write."""
        self._end_trackers()
        os.close(self._lock)

    def same_models(self, digests: Mapping[str, str]) -> None:
        """Refuse to resume with another base model or tokenizer.

        Raises:
            RunFolderError: a digest differs from the one that was noted when the run began.
        """
        for what, digest in digests.items():
            if self._run.get(what, digest) != digest:
                raise RunFolderError(
                    f"{self.path}: {what} was {self._run[what]} when the run began, it is {digest} now"
                )

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def rewind(self, metrics_bytes: int) -> None:
        """Cut metrics.jsonl to this length: the round after the checkpoint is trained again. Events stay."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            os.truncate(file, min(metrics_bytes, file.stat().st_size))

    def model_info(self, facts: Mapping[str, object]) -> None:
        """Add facts to run.json."""
        self._run |= facts
        write_atomically(self.path / "run.json", json.dumps(_plain(self._run), indent=2) + "\n")

    def fact(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - any JSON value
        """A fact of run.json."""
        return self._run.get(key, default)

    def event(self, kind: str, /, **fields: object) -> None:
        """Write an event, and log it; see ``server.run.events.KINDS``."""
        event = new_event(kind, fields)
        self._append("events.jsonl", event)
        log_event(self.path.name, event)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of one round, client and phase (train, evaluate or aggregate), also for the trackers."""
        self._append("metrics.jsonl", dict(record))
        if record["phase"] == "evaluate" and not record.get("age"):
            self.evaluations.setdefault(record["round"], {})[record["client"]] = record["evaluate"]
        if self._trackers is not None:
            self._trackers.log(record)

    def samples(self, samples: list[dict[str, str]]) -> None:
        """Write questions from the server's own set with the answers before and after; never a site's rows."""
        write_atomically(self.path / "samples.json", json.dumps(samples, indent=2, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Note that the run ended well."""
        self._end("completed", None)

    def fail(self, reason: str, kind: str, causes: Mapping[str, str] | None = None) -> None:
        """Note that the run failed.

        Args:
            reason: a sentence for people.
            kind: kind of the error.
            causes: kinds of the sites' errors behind it, by site.
        """
        self._end("failed", one_line(reason), kind=kind, causes=dict(causes or {}))

    def interrupt(self) -> None:
        """Note that the run was stopped and can be resumed."""
        self._end("interrupted", "the server was stopped, by Flower or a signal")

    def _track(self, federation: FederationConfig) -> None:
        """Open the trackers; they know a resumed run by its id."""
        self.model_info({"id": self._run.get("id", uuid.uuid4().hex)})
        self._trackers = Trackers(
            self.path, federation, self._run["id"], lambda reason: self.event("tracker_failed", reason=reason)
        )

    def _end_trackers(self, status: str = "interrupted") -> None:
        if self._trackers is not None:
            self._trackers.end(status)
            self._trackers = None

    def _end(self, status: str, reason: str | None, **error: object) -> None:
        self._end_trackers(status)
        seconds = round(time.time() - self._started, 3)
        self.event("finished", seconds=seconds) if reason is None else self.event(status, reason=reason, **error)
        ended = {"status": status, "reason": reason, **error}
        self.model_info({**ended, "finished": time.time(), "seconds": seconds})

    def _append(self, name: str, record: Mapping[str, object]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")


def write_federation(path: Path, federation: FederationConfig) -> Path:
    """Write the federation file, with absolute paths and all defaults, into the run's folder; return the file's path.

    Raises:
        RunFolderError: it cannot be written.
    """
    text = yaml.safe_dump(federation.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / FEDERATION, text)
    except OSError as error:
        raise RunFolderError(f"run folder {path} cannot be written: {error.strerror or error}") from None
    return path / FEDERATION


def in_use(path: Path) -> bool:
    """Whether a living server writes to the folder ``path``."""
    return is_held(path / _LOCK)


def refuse_existing(path: Path) -> None:
    """Raise a RunFolderError when ``path`` already holds a run; logs and Flower's own files are none."""
    try:
        found = [name for name in _RESULTS if (path / name).exists()]
    except OSError as error:
        raise RunFolderError(f"run folder {path} cannot be read: {error.strerror or error}") from None
    if found:
        raise RunFolderError(f"{path} already holds a run ({found[0]}); choose another `name`, or remove the folder")


def check_resumable(path: Path, federation: FederationConfig) -> None:
    """Raise a RunFolderError when ``path`` holds no run that can go on under this (resolved) federation file."""
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        before = yaml.safe_load((path / FEDERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise RunFolderError(f"{path} holds no run that could go on; leave out --resume") from None
    if run.get("status") == "completed" and not run.get("undelivered"):
        raise RunFolderError(f"{path}: the run has ended well, nothing is left to do")
    how = changes(before, federation.model_dump(mode="json"))
    if how:
        raise RunFolderError(f"{path}: the federation file has changed since the run began: {how}")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The differences between two federation files, in words; empty when there are none that matter to the result."""
    then, now = (flat({k: v for k, v in data.items() if k not in _MAY_CHANGE}) for data in (before, after))
    changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    return "; ".join(f"`{key}` was {then.get(key)!r}, is {now.get(key)!r}" for key in changed[:5])


def read_run(path: Path) -> dict[str, Any]:
    """The run.json of the folder ``path``; empty when there is none.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        file = path / "run.json"
        return as_object(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without an incomplete last line; no records when there is no file.

    Raises:
        RunFolderError: a complete line is no JSON; names file and line.
    """
    if not path.exists():
        return []
    records = []
    # Read bytes, not text: the last line may be incomplete and end within a character.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(as_object(line))
        except ValueError:
            raise RunFolderError(f"{path}, line {number}: not valid JSON, or no object") from None
    return records


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A copy of the value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
