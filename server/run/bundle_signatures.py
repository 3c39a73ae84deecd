"""Signatures of the app bundle in the run folder: the supervisor leaves them, every message to a site carries them."""

import json
from pathlib import Path

from common.system.files import write_atomically

_FILE = "signatures.json"


def keep(run_dir: Path, signatures: list[dict[str, str]]) -> None:
    """Leave them where the ServerApp finds them; without any, those from before the run was resumed stay."""
    if signatures:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / _FILE, json.dumps(signatures) + "\n")


def kept(run_dir: Path) -> str | None:
    """The signatures of a run, as JSON for its messages; None when there are none."""
    file = run_dir / _FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None
