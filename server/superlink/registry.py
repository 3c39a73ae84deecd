"""The register of sites, a file of the operator's: ``fedspan sites``.

The file is the truth: ``--registry FILE`` of a run makes Flower's own register follow it, also while a run goes on. A
revoked key never comes back; the site makes a new pair.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BeforeValidator, Field

from common.config.load import parse
from common.config.section import Name, Section
from common.errors import ConfigError
from common.system.command import Command
from common.system.files import hold
from common.system.keys import fingerprint, may_be_in_git, read_bytes, read_public, refuse_git, write

_PATIENCE = 10.0  # seconds to wait for another who edits the file
_Date = Annotated[date, BeforeValidator(lambda value: date.fromisoformat(value) if isinstance(value, str) else value)]
_Time = Annotated[
    datetime, BeforeValidator(lambda value: datetime.fromisoformat(value) if isinstance(value, str) else value)
]


class Registered(Section):
    """A key with which a site may, or might, connect."""

    name: Name
    key: str
    fingerprint: str
    registered: _Time
    expires: _Date | None = None
    revoked: _Time | None = None

    def state(self, now: datetime) -> str:
        """``active``, ``expired`` or ``revoked``; a key expires at the end of its last day (UTC)."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now.date() > self.expires else "active"


class Registry(Section):
    """The whole file, in the order of registration."""

    sites: list[Registered] = Field([])

    def active(self, now: datetime) -> dict[str, Registered]:
        """The sites that may connect now, by public key (PEM)."""
        return {site.key: site for site in self.sites if site.state(now) == "active"}


def read(path: Path) -> Registry:
    """Read the file.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    try:
        data = json.loads(read_bytes(path))
    except ValueError:
        raise ConfigError(f"{path}: not a register of sites (no valid JSON)") from None
    return parse(data, Registry, str(path))


def add(path: Path, name: str, key_file: Path, expires: date | None) -> Registered:
    """Let a site connect with a key; with the key that it has, change when that expires.

    Raises:
        ConfigError: the key cannot be used, or the name or the key is taken.
    """
    key = read_public(key_file)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{key_file}: not an ECDSA key; the site makes one with: fedspan keys site {name}")
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    now = datetime.now(UTC).replace(microsecond=0)
    if expires is not None and expires < now.date():
        raise ConfigError(f"--expires {expires}: is in the past")
    with _edit(path) as sites:
        for site in sites:
            if site.key == pem and (site.name != name or site.revoked is not None):
                what = "was revoked" if site.revoked is not None else f"is that of {site.name}"
                raise ConfigError(f"{key_file}: this key {what}; {name} needs a pair of its own, made anew")
            if site.name == name and site.key != pem and site.revoked is None:
                raise ConfigError(f"{path}: {name} has the key {site.fingerprint}; revoke it before adding another")
        known = next((site for site in sites if site.key == pem), None)
        new = {"name": name, "key": pem, "fingerprint": fingerprint(key), "registered": now, "expires": expires}
        added = parse({**new, **({"registered": known.registered} if known else {})}, Registered, "registration")
        sites[:] = [site for site in sites if site is not known] + [added]
    return added


def revoke(path: Path, name: str) -> Registered:
    """Let a site connect no more.

    Raises:
        ConfigError: no site of this name may connect.
    """
    with _edit(path, missing_ok=False) as sites:
        for number, site in enumerate(sites):
            if site.name == name and site.revoked is None:
                gone = site.model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
                sites[number] = gone
                return gone
        known = ", ".join(site.name for site in sites if site.revoked is None) or "nobody"
        raise ConfigError(f"{path}: {name} is not registered; registered: {known}")


@contextlib.contextmanager
def _edit(path: Path, *, missing_ok: bool = True) -> Iterator[list[Registered]]:
    """The file's sites, to be changed, written back at the end; another who edits it waits until then."""
    try:
        lock = hold(path.with_name(f".{path.name}.lock"), _PATIENCE)
    except OSError as error:
        raise ConfigError(f"{path}: its folder cannot be written ({error.strerror})") from None
    if lock is None:
        raise ConfigError(f"{path}: somebody else has been editing it for {_PATIENCE:g} s; try again")
    try:
        sites = list(read(path).sites) if path.exists() or not missing_ok else []
        yield sites
        write(path, (Registry(sites=sites).model_dump_json(indent=2) + "\n").encode())
    finally:
        os.close(lock)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a date as {date.today() + timedelta(365)}") from None


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the register")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    _file(parser)
    parser.add_argument("name", metavar="NAME", help="name of the site, as in its site file")
    parser.add_argument("key", type=Path, metavar="NAME.pub", help="the site's public key")
    parser.add_argument("--expires", type=_date, metavar="YYYY-MM-DD", help="its last day, in UTC (default: none)")
    may_be_in_git(parser)


def _add(options: argparse.Namespace) -> None:
    if not options.file.exists():
        refuse_git(options.file, options)
    _show([add(options.file, options.name, options.key, options.expires)])


def _revoke_arguments(parser: argparse.ArgumentParser) -> None:
    _file(parser)
    parser.add_argument("name", metavar="NAME", help="name of the site")


def _show(sites: list[Registered]) -> None:
    for site in sites:
        until = f"until {site.expires}" if site.expires is not None else "without end"
        state = site.state(datetime.now(UTC))
        print(f"{site.name:16} {state:8} {site.fingerprint}  since {site.registered:%Y-%m-%d}, {until}")  # noqa: T201


ADD = Command(
    arguments=_add_arguments,
    run=_add,
    example="sites.json site-a site-a.pub --expires 2027-12-31",
    then="fedspan serve FEDERATION.yaml --registry sites.json ...",
    notes="With the key that a site has already, --expires is changed. A run follows the file while it goes on.",
)
REVOKE = Command(
    arguments=_revoke_arguments,
    run=lambda options: _show([revoke(options.file, options.name)]),
    example="sites.json site-a",
    then="a new pair of keys, made by the site: fedspan keys site site-a",
    notes="The key never comes back. A run that goes on ends the site's connection.",
)
LIST = Command(
    arguments=_file,
    run=lambda options: _show(list(read(options.file).sites)),
    example="sites.json",
    then="fedspan sites add sites.json NAME NAME.pub",
)
