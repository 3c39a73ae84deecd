"""The operator's files of signatures, held against the bundle that would be shipped."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.system.keys import read_bytes
from server.superlink.bundle import bundle_digest

_KEYS = ("digest", "key", "signature", "made")


def read_signature(path: Path) -> dict[str, str]:
    """A file that ``fedspan code sign`` made.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        entry = json.loads(read_bytes(path))
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in _KEYS):
        raise ConfigError(f"{path}: no signature of a bundle; make one with: fedspan code sign")
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
