"""Code, link and registered keys of a run, written into its folder for the report. No secrets."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes

from common.config.federation import FederationConfig, settings_for_sites
from common.config.section import settings_digest
from common.errors import RunFolderError
from common.system.files import write_atomically
from common.system.keys import host_names, read_certificates
from server.superlink.process import OwnSuperLink, Tls

_FILE = "security.json"


def note(run_dir: Path, bundle: bytes, superlink: OwnSuperLink | str, federation: FederationConfig) -> None:
    """Add an entry to security.json, if anything differs from the last one.

    Args:
        run_dir: the run's folder.
        bundle: the app bundle that is submitted.
        superlink: the SuperLink that it is submitted to; or its name in Flower's configuration.
        federation: the federation file's content.

    Raises:
        RunFolderError: the folder cannot be written.
        ConfigError: the SuperLink's certificate cannot be read.
    """
    entry: dict[str, Any] = {
        "bundle": hashlib.sha256(bundle).hexdigest(),
        "settings": settings_digest(json.loads(settings_for_sites(federation))),
        "link": {"named": superlink} if isinstance(superlink, str) else _link(superlink),
    }
    file = run_dir / _FILE
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if not entries or entries[-1] != entry:
            write_atomically(file, json.dumps([*entries, entry], indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be written: {error}") from None


def _link(superlink: OwnSuperLink) -> dict[str, Any]:
    return {
        "local": superlink.fleet.startswith("unix:"),
        "registered": superlink.registry is not None,
        "tls": None if superlink.tls is None else _certificate(superlink.tls),
    }


def _certificate(tls: Tls) -> dict[str, Any]:
    own, root = (read_certificates(file)[0] for file in (tls.certificate, tls.ca))
    return {
        "certificate": own.fingerprint(hashes.SHA256()).hex(),
        "names": host_names(own),
        "until": f"{own.not_valid_after_utc:%Y-%m-%d}",
        "ca": root.fingerprint(hashes.SHA256()).hex(),
    }
