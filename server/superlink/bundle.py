"""The app bundle that the server ships and a reviewer signs. pyproject.toml says which files it holds."""

import hashlib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError


def make_bundle(app: Path) -> bytes:
    """The bundle that Flower's ``flwr build`` makes of an app's folder, byte for byte.

    Flower looks at every file below the folder, those of a virtual environment too. This reads only the folders that
    ``fab-include`` names.

    Raises:
        ConfigError: the folder holds no app that could be bundled.
    """
    import click
    from flwr.cli.build import build_fab_from_files, get_user_fab_patterns

    try:
        config = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
        include, exclude = get_user_fab_patterns(config)
        starts = _starts([*include, *(exclude or [])]) if include else [""]  # Flower refuses a pattern without a file
        return build_fab_from_files(_files(app, starts))[0]
    except (ValueError, OSError, click.ClickException) as error:
        raise ConfigError(f"{app}: cannot be bundled ({error})") from None


def bundle_digest(app: Path) -> str:
    """SHA-256 (hex) of an app folder's bundle, which is Flower's name for it.

    Raises:
        ConfigError: the folder holds no app that could be bundled.
    """
    return hashlib.sha256(make_bundle(app)).hexdigest()


def _starts(patterns: Sequence[str]) -> list[str]:
    """How the paths that match each pattern begin: with its text before the first wildcard.

    As in .gitignore, a pattern without a slash before its end matches at every depth: those paths begin anyhow.
    """
    return [re.match(r"[^*?\[\\]*", p.lstrip("/")).group() if "/" in p[:-1] else "" for p in patterns]  # type: ignore[union-attr]


def _files(app: Path, starts: Sequence[str]) -> dict[str, bytes | Path]:
    """Files by their paths below ``app``: those of the folder itself, and of folders that lead to a start."""
    from flwr.cli.utils import build_pathspec
    from flwr.common.constant import FAB_EXCLUDE_PATTERNS

    never = build_pathspec(FAB_EXCLUDE_PATTERNS)
    files: dict[str, bytes | Path] = {}
    for name, folders, entries in os.walk(app):
        prefix = "" if Path(name) == app else f"{Path(name).relative_to(app).as_posix()}/"
        found = {f"{prefix}{entry}": Path(name, entry) for entry in entries}
        files |= {path: file for path, file in found.items() if not file.is_symlink()}  # as Flower does
        folders[:] = [
            folder
            for folder in folders
            if not never.match_file(path := f"{prefix}{folder}/")
            and any(path.startswith(start) or start.startswith(path) for start in starts)
        ]
    return files
