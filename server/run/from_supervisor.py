"""Files that the supervisor writes into the run folder for the ServerApp: signatures, and the sites of nodes' keys."""

import json
from collections.abc import Mapping
from pathlib import Path

from common.system.files import write_atomically

_SIGNATURES, _OWNERS = "signatures.json", "nodes.json"


def keep_signatures(run_dir: Path, signatures: list[dict[str, str]]) -> None:
    """Write signatures, which go with every message to a site; an empty list leaves those of the resumed run."""
    if signatures:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / _SIGNATURES, json.dumps(signatures) + "\n")


def kept_signatures(run_dir: Path) -> str | None:
    """The signatures of a run, as JSON for its messages; None when there are none."""
    file = run_dir / _SIGNATURES
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def write_owners(run_dir: Path, owners: Mapping[str, Mapping[str, str | float]]) -> None:
    """Write the site that each SuperNode's key is registered to.

    Args:
        run_dir: the run's folder.
        owners: by node id: ``site``, ``key`` (fingerprint) and, if the node has connected, ``activated`` (Unix time).
    """
    write_atomically(run_dir / _OWNERS, json.dumps(owners, indent=2) + "\n")


def remove_owners(run_dir: Path) -> None:
    """Remove the file: the run has no register of sites (any more)."""
    (run_dir / _OWNERS).unlink(missing_ok=True)


def site_of(run_dir: Path, node_id: int) -> str | None:
    """The site that a node's key is registered to; "" for no site, None when the run has no register of sites."""
    owners = _owners(run_dir)
    return None if owners is None else str(owners.get(str(node_id), {}).get("site", ""))


def activated(run_dir: Path, node_id: int) -> float:
    """Unix time of the last connection of a SuperNode with a registered key; 0: unknown.

    A killed SuperNode reconnects as the same node, but has lost the messages that it had received; the server uses this
    time to notice that (decision 011).
    """
    return float((_owners(run_dir) or {}).get(str(node_id), {}).get("activated", 0.0))


def _owners(run_dir: Path) -> dict[str, dict[str, str | float]] | None:
    file = run_dir / _OWNERS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
