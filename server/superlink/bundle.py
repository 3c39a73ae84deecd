"""The app bundle that the server ships and a reviewer signs. pyproject.toml says which files it holds.

FedSpan's own is made of a checkout, or of what pip installed: there the two files at a checkout's root lie in ``app``
beside this file (setup.py), and what else is in site-packages does not belong to it. Both give the same bytes.
"""

import base64
import hashlib
import importlib.metadata
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # a checkout's root, or site-packages
_INSTALLED = Path(__file__).resolve().with_name("app")


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
        if app == ROOT and _INSTALLED.is_dir():
            return build_fab_from_files(_installed())[0]
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


def _installed() -> dict[str, bytes | Path]:
    """FedSpan's files by their paths, as pip wrote them down: another package may have files in these folders, too.

    Raises:
        ConfigError: pip has no record of them, or one of them is another file by now.
    """
    for installed in importlib.metadata.distributions(name="fedspan"):
        paths = installed.files or []
        if Path(str(installed.locate_file("server"))).resolve() == ROOT / "server" and paths:
            files: dict[str, bytes | Path] = {p.as_posix(): _as_recorded(p) for p in paths if p.suffix == ".py"}
            return files | {file.name: file for file in _INSTALLED.iterdir() if file.is_file()}
    raise ConfigError(f"{ROOT}: pip has no record of FedSpan's files here; install FedSpan again")


def _as_recorded(path: importlib.metadata.PackagePath) -> Path:
    file = ROOT / path
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
    if path.hash is not None and path.hash.value != digest:
        raise ConfigError(
            f"{file}: not the file that was installed; another package wrote over it: install FedSpan again"
        )
    return file


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
