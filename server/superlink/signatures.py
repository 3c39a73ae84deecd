"""Signatures of the app bundle, on their way from the operator's files into every message to a site."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.system.files import write_atomically
from common.system.keys import read_bytes
from server.superlink.bundle import bundle_digest

RECORD_KEY = "bundle-signatures"  # in every message's "config" record (see client.connect.verify)
_FILE = "signatures.json"  # in the run folder
_KEYS = ("digest", "key", "signature", "made")


def read_signature(path: Path) -> dict[str, str]:
    """A file that ``python -m deploy.keys.bundle sign`` made.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        entry = json.loads(read_bytes(path))
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in _KEYS):
        raise ConfigError(f"{path}: no signature of a bundle; make one with: python -m deploy.keys.bundle sign")
    return {key: entry[key] for key in _KEYS}


def read_signatures(paths: Sequence[Path], app: Path) -> list[dict[str, str]]:
    """Signatures of the bundle that would be shipped of the folder ``app``.

    Raises:
        ConfigError: a file is no signature, or one for other code.
    """
    entries = {path: read_signature(path) for path in paths}
    digest = bundle_digest(app) if entries else ""
    for path, entry in entries.items():
        if entry["digest"] != digest:
            raise ConfigError(
                f"{path}: is for bundle {entry['digest']}, the code here makes bundle {digest}; sign anew"
            )
    return list(entries.values())


def keep(run_dir: Path, signatures: list[dict[str, str]]) -> None:
    """Leave them where the ServerApp finds them; without any, those from before the run was resumed stay."""
    if signatures:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / _FILE, json.dumps(signatures) + "\n")


def kept(run_dir: Path) -> str | None:
    """The signatures of a run, as JSON for its messages; None when there are none."""
    file = run_dir / _FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None
