"""What the supervisor leaves in the run folder for the ServerApp: signatures of the code, and whose key a node has."""

import json
from collections.abc import Mapping
from pathlib import Path

from common.system.files import write_atomically

_SIGNATURES, _OWNERS = "signatures.json", "nodes.json"


def keep_signatures(run_dir: Path, signatures: list[dict[str, str]]) -> None:
    """Leave them for every message to a site; without any, those from before the run was resumed stay."""
    if signatures:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / _SIGNATURES, json.dumps(signatures) + "\n")


def kept_signatures(run_dir: Path) -> str | None:
    """The signatures of a run, as JSON for its messages; None when there are none."""
    file = run_dir / _SIGNATURES
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def write_owners(run_dir: Path, owners: Mapping[str, Mapping[str, str | float]]) -> None:
    """Leave whose key each SuperNode has.

    Args:
        run_dir: the run's folder.
        owners: by node id: ``site``, ``key`` (its fingerprint) and, once it was connected, ``activated`` (Unix time).
    """
    write_atomically(run_dir / _OWNERS, json.dumps(owners, indent=2) + "\n")


def remove_owners(run_dir: Path) -> None:
    """The run has no register of sites (any more)."""
    (run_dir / _OWNERS).unlink(missing_ok=True)


def site_of(run_dir: Path, node_id: int) -> str | None:
    """To which site the key of a node is registered; "" for none, None when the run has no register of sites."""
    owners = _owners(run_dir)
    return None if owners is None else str(owners.get(str(node_id), {}).get("site", ""))


def activated(run_dir: Path, node_id: int) -> float:
    """Unix time at which the SuperNode with a registered key connected last; 0 when that is not known.

    A SuperNode that was killed comes back as the same node, but without the messages that it had received.
    """
    return float((_owners(run_dir) or {}).get(str(node_id), {}).get("activated", 0.0))


def _owners(run_dir: Path) -> dict[str, dict[str, str | float]] | None:
    file = run_dir / _OWNERS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
