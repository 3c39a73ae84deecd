"""Prepares the federation of docker-compose.yml: ``python -m deploy.compose.setup``, the one-shot service ``setup``.

Makes a certificate authority, the server's certificate, a key pair per site and one for signing code, registers the
sites, signs the bundle that the server will ship, and hands every party its own: each folder written here is a volume
that one other container sees, the model's excepted. Existing files stay, but for the signature, which is made again.
"""

import shutil
import sys
from pathlib import Path

from deploy.cli import main as fedspan

SITES = ("site-a", "site-b", "site-c")
DEMO = Path("/demo")  # made by `fedspan demo` when the image was built
CA, CERTS, DATA, MODEL, REGISTRY = map(Path, ("/ca", "/server-certs", "/server-data", "/model", "/registry"))
OWN = {site: (Path(f"/{site}-certs"), Path(f"/{site}-data")) for site in SITES}
READY = CA / "ready"  # written last


def main() -> None:
    """Fill the volumes."""
    if not READY.exists():
        for folder in (CA, CERTS, DATA, MODEL, REGISTRY, *(place for places in OWN.values() for place in places)):
            for left in folder.iterdir():  # by a setup that was interrupted
                left.unlink()
        _hand_out()
        READY.touch()
    _fedspan("code", "sign", "--key", str(CA / "release.key"), "--out", str(CERTS / "bundle.sig"))


def _hand_out() -> None:
    _fedspan("keys", "ca", str(CA))
    _fedspan("keys", "server", str(CA), "--host", "server")
    _fedspan("code", "key", str(CA / "release"))
    _copy(CA, CERTS, "ca.crt", "server.pem", "server.key")
    _copy(DEMO / "icd", DATA, "server.jsonl")
    for site, (certs, data) in OWN.items():
        _fedspan("keys", "site", str(certs / "site"))
        _fedspan("sites", "add", str(REGISTRY / "sites.json"), site, str(certs / "site.pub"))
        _copy(CA, certs, "ca.crt", "release.pub")
        _copy(DEMO / "icd", data, f"{site}.jsonl")
    _copy(DEMO / "smollm2", MODEL, *(file.name for file in (DEMO / "smollm2").iterdir()))


def _copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        shutil.copy(source / name, target)


def _fedspan(*command: str) -> None:
    code = fedspan(list(command))
    if code != 0:
        sys.exit(code)


if __name__ == "__main__":
    main()
