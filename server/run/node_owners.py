"""Whose key each SuperNode has, in a file of the run folder: who follows the register of sites writes it."""

import json
from collections.abc import Mapping
from pathlib import Path

from common.system.files import write_atomically

_FILE = "nodes.json"


def write(run_dir: Path, owners: Mapping[str, Mapping[str, str | float]]) -> None:
    """Leave it where the ServerApp finds it.

    Args:
        run_dir: the run's folder.
        owners: by node id: ``site``, ``key`` (its fingerprint) and, once it was connected, ``activated`` (Unix time).
    """
    write_atomically(run_dir / _FILE, json.dumps(owners, indent=2) + "\n")


def remove(run_dir: Path) -> None:
    """The run has no register of sites (any more)."""
    (run_dir / _FILE).unlink(missing_ok=True)


def site_of(run_dir: Path, node_id: int) -> str | None:
    """To which site the key of a node is registered; "" for none, None when the run has no register of sites."""
    owners = _read(run_dir)
    return None if owners is None else str(owners.get(str(node_id), {}).get("site", ""))


def activated(run_dir: Path, node_id: int) -> float:
    """Unix time at which the SuperNode with a registered key connected last; 0 when that is not known.

    A SuperNode that was killed comes back as the same node, but without the messages that it had received.
    """
    return float((_read(run_dir) or {}).get(str(node_id), {}).get("activated", 0.0))


def _read(run_dir: Path) -> dict[str, dict[str, str | float]] | None:
    file = run_dir / _FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
