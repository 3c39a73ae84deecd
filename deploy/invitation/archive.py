"""The archive of an invitation: a zip of a few small files, and a manifest with the SHA-256 of each.

The same content makes the same bytes, so that both sides can compare one hash. The reader trusts nothing: only listed
names are allowed, nothing compressed, linked or large, and every file must have the manifest's digest.
"""

import hashlib
import io
import json
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from common.config.load import parse
from common.config.section import SERVER, Digest, Name, Section
from common.errors import ConfigError
from common.system.keys import read_bytes

FORMAT = 1
MANIFEST, CA, FEDERATION, SITE = "manifest.json", "ca.crt", "federation.yaml", "site.yaml"
_REVIEWERS = "reviewer"
REVIEWER, SIGNATURE = f"{_REVIEWERS}.pub", "settings.sig"
ALWAYS, OPTIONAL = {CA, FEDERATION, SITE}, {REVIEWER, SIGNATURE}
_KIND = "FedSpan invitation"
_MOST_BYTES = 2**20  # for an archive, and for all of its files together
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip knows
_PLAIN = stat.S_IFREG | 0o600


class Manifest(Section):
    """The manifest of an archive.

    Attributes:
        superlink: HOST:PORT of the server.
        files: SHA-256 (hex) of every other file, by name.
    """

    kind: Literal["FedSpan invitation"]
    format: Literal[1]
    site: Name
    federation: Name
    superlink: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,255}:[0-9]{1,5}$")]
    files: dict[str, Digest]

    @field_validator("site")
    @classmethod
    def _not_taken(cls, site: str) -> str:
        if site in (SERVER, _REVIEWERS):
            raise ValueError(f"{site!r} is no name for a site here: it is the {site}'s")
        return site


def pack(site: str, federation: str, superlink: str, files: Mapping[str, bytes]) -> bytes:
    """The archive of an invitation.

    Args:
        site: name of the invited site.
        federation: name of the federation.
        superlink: HOST:PORT of the federation's server.
        files: the files' content by name.
    """
    about = {"kind": _KIND, "format": FORMAT, "site": site, "federation": federation, "superlink": superlink}
    about |= {"files": {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}}
    manifest = parse(about, Manifest, "the invitation")
    content = {MANIFEST: (manifest.model_dump_json(indent=2) + "\n").encode(), **files}
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(content):
                info = zipfile.ZipInfo(name, _EPOCH)
                info.create_system, info.external_attr = 3, _PLAIN << 16  # the same on every system
                archive.writestr(info, content[name])
        return out.getvalue()


def unpack(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read and check the manifest and the files of an archive from the other side.

    Raises:
        ConfigError: the file is no invitation, has another format, or differs from its manifest; the text names it.
    """
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{path}: no invitation: {path.stat().st_size:,} bytes; allowed: {_MOST_BYTES:,}")
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as archive:
            members = archive.infolist()
            _check_members(path, members)
            files = {info.filename: archive.read(info) for info in members}
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"{path}: no invitation, or damaged on its way ({error})") from None
    manifest = _manifest(path, files.pop(MANIFEST, b""))
    if missing := (ALWAYS | manifest.files.keys()) - files.keys():
        raise ConfigError(f"{path}: lacks {min(missing)}")
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != manifest.files.get(name):
            raise ConfigError(f"{path}: {name} is not what the manifest says; ask the operator for the archive again")
    return manifest, files


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    allowed = {MANIFEST} | ALWAYS | OPTIONAL
    names = [info.filename for info in members]
    for info in members:
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        if name not in allowed:
            raise ConfigError(f"{path}: holds {name[:80]!r}; allowed: {', '.join(sorted(allowed))}")
        if names.count(name) > 1:
            raise ConfigError(f"{path}: holds {name} twice")
        if kind not in (0, stat.S_IFREG) or info.compress_type != zipfile.ZIP_STORED:
            raise ConfigError(f"{path}: {name} is no plain file that `fedspan server invite` has packed")
    if sum(info.file_size for info in members) > _MOST_BYTES:
        raise ConfigError(f"{path}: its files hold more than {_MOST_BYTES:,} bytes")


def _manifest(path: Path, content: bytes) -> Manifest:
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise ConfigError(f"{path}: no invitation (no {MANIFEST} of one)")
    if about.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: an invitation of format {str(about.get('format'))[:20]!r}, this FedSpan reads format {FORMAT}; "
            "take the version of FedSpan that the operator has"
        )
    return parse(about, Manifest, f"{path}: {MANIFEST}")
