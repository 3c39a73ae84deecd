"""Checkpoints: the state after a round, from which a run is resumed when its server has died (decision 009).

    checkpoints/round-000003/
        checkpoint.json        round, versions, length of metrics.jsonl, SHA-256 of the files below
        state.safetensors      the global state
        steps.safetensors      the last steps that led to the state
        moments.safetensors    the server optimizer's moments, if there is a server optimizer
        waiting.safetensors    changes that are not published yet, if there are any (decision 039)
    checkpoints/best-000002/
        best.json              version, SHA-256 of the file below
        state.safetensors      the best round's state; it stays when its checkpoint is removed

A folder appears complete or not at all (``common.system.files``); every file is compared with its digest before it is
used. Nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import FederationError
from common.protocol.tensors import Tensors, flatten, unflatten
from common.protocol.versions import Step
from common.system.files import built
from server.run.folder import CHECKPOINTS
from strategies.flower.versions import Versions

_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """All state that a resumed run needs.

    Attributes:
        round: the last finished round.
        state: the global state after that round.
        versions: the state's versions and steps; None under a strategy without steps.
        metrics_bytes: length of metrics.jsonl after that round; later lines belong to a round that was not finished.
        refusals: number of updates rejected in a row, by site.
        moments: the server optimizer's moments, by kind; empty without a server optimizer.
        waiting: changes that wait to be sent to the sites (``strategies.way_down``); empty when nothing does.
    """

    round: int
    state: Tensors
    versions: Versions | None
    metrics_bytes: int
    refusals: dict[str, int] = field(default_factory=dict)
    moments: dict[str, Tensors] = field(default_factory=dict)
    waiting: Tensors = field(default_factory=dict)


def save(run_dir: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint and remove all but the newest ``keep``.

    Raises:
        FederationError: the checkpoint cannot be written, e.g. on a full disk; older checkpoints are unchanged.
    """
    folder = run_dir / CHECKPOINTS
    final = folder / f"round-{checkpoint.round:06}"
    versions = checkpoint.versions
    steps = {} if versions is None else {str(step.server_round): step.tensors for _, step in versions.steps}
    files = {"state": checkpoint.state, "steps": flatten(steps)}
    if checkpoint.moments:
        files["moments"] = flatten(checkpoint.moments)
    if checkpoint.waiting:
        files["waiting"] = checkpoint.waiting
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "round": checkpoint.round,
        "metrics_bytes": checkpoint.metrics_bytes,
        "refusals": checkpoint.refusals,
    }
    if versions is not None:
        facts["versions"] = {"first": versions.first, "latest": versions.latest}
        facts["versions"]["steps"] = [[since, step.server_round] for since, step in versions.steps]
    for killed in folder.glob(".round-*"):  # half-written by a server that was killed; a run has one server at a time
        shutil.rmtree(killed, ignore_errors=True)
    try:
        with built(final) as new:
            for name, tensors in files.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / f"{name}.safetensors")
            facts["sha256"] = {file.name: _digest(file) for file in sorted(new.iterdir())}
            text = json.dumps({**facts, "checksum": _checksum(facts)}, indent=2) + "\n"
            (new / "checkpoint.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise FederationError(f"round {checkpoint.round}: checkpoint {final} cannot be written: {error}") from None
    for old in _all(run_dir)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def keep_best(run_dir: Path, number: int, state: Tensors, version: str | None) -> None:
    """Keep the state after round ``number``, the best one so far, beside the checkpoints.

    Raises:
        FederationError: it cannot be written.
    """
    final = run_dir / CHECKPOINTS / f"best-{number:06}"
    file = "state.safetensors"
    try:
        with built(final) as new:
            try:
                (new / file).hardlink_to(run_dir / CHECKPOINTS / f"round-{number:06}" / file)  # the same bytes
            except OSError:
                save_file({key: tensor.contiguous() for key, tensor in state.items()}, new / file)
            told = {"version": version, "sha256": _digest(new / file)}
            (new / "best.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise FederationError(f"round {number}: the best state {final} cannot be written: {error}") from None


def best_state(run_dir: Path, number: int) -> tuple[Tensors, str | None]:
    """The state that ``keep_best`` has kept, and its version.

    Raises:
        FederationError: it cannot be read, or is damaged.
    """
    folder = run_dir / CHECKPOINTS / f"best-{number:06}"
    try:
        told = json.loads((folder / "best.json").read_text(encoding="utf-8"))
        if _digest(folder / "state.safetensors") != told["sha256"]:
            raise ValueError("state.safetensors does not fit its digest")
        return load_file(folder / "state.safetensors"), told["version"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FederationError(f"the best state {folder} cannot be read: {error}") from None


def drop_best(run_dir: Path, number: int | None) -> None:
    """Remove the states that ``keep_best`` has kept, but for that after round ``number``."""
    for folder in (run_dir / CHECKPOINTS).glob("best-*"):
        if folder.name != f"best-{number or 0:06}":
            shutil.rmtree(folder, ignore_errors=True)


def newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint; None when the run has no checkpoint.

    Args:
        run_dir: the run's folder.
        warn: called with a sentence about each damaged checkpoint that is skipped.

    Raises:
        FederationError: there are checkpoints, and all are damaged.
    """
    found = _all(run_dir)
    for folder in found:
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warn(f"checkpoint {folder} is damaged ({error}); the one before it is taken")
    if found:
        raise FederationError(
            f"all {len(found)} checkpoints in {run_dir / CHECKPOINTS} are damaged; nothing to resume from"
        )
    return None


def _load(folder: Path) -> Checkpoint:
    facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    checksum = facts.pop("checksum")
    if checksum != _checksum(facts):
        raise ValueError("checkpoint.json does not fit its checksum")
    if facts["format"] != _FORMAT:
        raise ValueError(f"format {facts['format']} is not {_FORMAT}")
    for name, digest in facts["sha256"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} does not fit its digest")
    state = load_file(folder / "state.safetensors")
    versions = None
    if "versions" in facts:
        tensors = unflatten(load_file(folder / "steps.safetensors"))
        told = facts["versions"]
        steps = [(since, Step(number, tensors.get(str(number), {}))) for since, number in told["steps"]]
        versions = Versions(state, told["first"], told["latest"], steps)
    file, later = folder / "moments.safetensors", folder / "waiting.safetensors"
    moments = unflatten(load_file(file)) if file.name in facts["sha256"] else {}
    waiting = load_file(later) if later.name in facts["sha256"] else {}
    return Checkpoint(facts["round"], state, versions, facts["metrics_bytes"], facts["refusals"], moments, waiting)


def _all(run_dir: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    return sorted((run_dir / CHECKPOINTS).glob("round-*"), reverse=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
