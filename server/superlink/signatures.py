"""The operator's files of signatures, held against the bundle that would be shipped."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.system.keys import read_signature
from server.superlink.bundle import bundle_digest


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
