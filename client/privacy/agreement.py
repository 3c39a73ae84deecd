"""A site's agreements: the settings that sites are sent, for each federation, pinned in the site's own file.

A site rejects a message with other settings before it opens any data. The error is always the same sentence, so that it
reveals nothing (decision 027). ``fedspan site agree`` (``client.connect.agree``) writes the file; a launcher writes it
for sites of its own on one machine.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from common.config.federation import FederationConfig, ModelConfig, settings_for_sites
from common.config.load import parse
from common.config.section import Section, canonical, resolve, settings_digest
from common.config.site import SiteConfig
from common.errors import ConfigError, PolicyError
from common.system.files import hold, make_private, write_atomically

NOT_AGREED = "this site has not agreed to these settings; its people do so with: fedspan site agree FEDERATION.yaml"
_LOCK_SECONDS = 10.0
log = logging.getLogger(__name__)


class Agreement(Section):
    """A site's agreement to one federation.

    Attributes:
        settings: the settings that the federation's sites are sent.
        model: the section ``model`` of the site's copy of the federation file: the base model's source, unless the
            site file names one, and the digests that the base model must have.
        agreed: time of the agreement, in UTC.
        reviewer: fingerprint of the key that has signed the settings; None: no signature.
        peers: fingerprints (``SHA256:...``) of the registered keys of the sites with which this one lets its update be
            added up, by name; with `secure_aggregation`, no other site is taken for one.
        least_peers: the least number of them, beside this site, whose updates are in a sum.
    """

    settings: dict[str, Any]
    model: ModelConfig
    agreed: str
    reviewer: str | None = None
    peers: dict[str, str] = Field({})
    least_peers: int = Field(1, ge=1)

    @property
    def by_fingerprint(self) -> dict[str, str]:
        """Names of the peers, by fingerprint."""
        return {fingerprint: name for name, fingerprint in self.peers.items()}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings, by which people compare them."""
        return settings_digest(self.settings)

    @property
    def federation(self) -> FederationConfig:
        """The settings, typed.

        Raises:
            ConfigError: this version of FedSpan does not know them.
        """
        federation = parse(self.settings, FederationConfig, "what this site has agreed to")
        return federation.model_copy(update={"model": self.model})


class _File(Section):
    format: int = Field(1, ge=1, le=1)
    federations: dict[str, Agreement] = Field({}, description="By name.")


def agreements_of(site: SiteConfig, site_file: Path) -> Path:
    """Path of a site's file of agreements."""
    return resolve(site.agreements or f"{site.name}-agreements.json", site_file)


def make_agreement(federation: FederationConfig, reviewer: str | None = None) -> Agreement:
    """Make the agreement to a federation's settings.

    Args:
        federation: the federation, with absolute paths (``common.config.federation.resolved``).
        reviewer: see ``Agreement``.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    settings = json.loads(settings_for_sites(federation))
    return Agreement(settings=settings, model=federation.model, agreed=now, reviewer=reviewer)


def read_agreements(file: Path) -> dict[str, Agreement]:
    """All agreements in a file, by the federations' names; none when there is no file.

    Raises:
        ConfigError: the file is no file of agreements.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        return _File.model_validate_json(text).federations
    except ValidationError:
        mend = "move it away and agree anew"
        raise ConfigError(f"{file}: no file that `fedspan site agree` wrote; {mend}") from None


def write_agreement(file: Path, name: str, agreement: Agreement | None) -> None:
    """Add or replace the agreement to a federation; None removes it.

    Raises:
        ConfigError: the file is damaged, held by another process, or cannot be written.
    """
    try:
        lock = hold(file.with_name(f".{file.name}.lock"), _LOCK_SECONDS)
        if lock is None:
            raise ConfigError(f"{file}: another process holds it for {_LOCK_SECONDS:g} s")
        try:
            others = {known: one for known, one in read_agreements(file).items() if known != name}
            kept = others if agreement is None else {**others, name: agreement}
            write_atomically(file, _File(federations=kept).model_dump_json(indent=1) + "\n", 0o600)
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror})") from None


def agree_for_own_sites(file: Path, federation: FederationConfig, sites: Iterable[str] = ()) -> dict[str, Path]:
    """Write the agreement for a launcher that owns both the federation file and all of the sites.

    Args:
        file: the file of agreements, for all sites; keys are made beside it.
        federation: the federation, with absolute paths.
        sites: names of the sites.

    Returns:
        The files with the sites' private keys, by name; none unless the federation needs keys.
    """
    agreement, keys = make_agreement(federation), {}
    if federation.secure_aggregation is not None:
        from common.system.keys import make_site

        make_private(folder := file.with_suffix(".keys"))
        prefixes = {site: Path(tempfile.mkdtemp(dir=folder), site) for site in sites}
        agreement = agreement.model_copy(update={"peers": {site: make_site(at) for site, at in prefixes.items()}})
        keys = {site: at.parent / f"{site}.key" for site, at in prefixes.items()}
    write_agreement(file, federation.name, agreement)
    return keys


def find(agreements: dict[str, Agreement], sent: str) -> Agreement:
    """Find the agreement to the settings in a message.

    Args:
        agreements: the site's agreements, by the federations' names.
        sent: the settings in the message, as JSON.

    Raises:
        PolicyError: there is no such agreement. The text is always the same; only the site's log names the difference.
    """
    try:
        settings = json.loads(sent)
        wanted = canonical(settings)
    except (ValueError, RecursionError):
        log.warning("a message's federation settings are no JSON")
        raise PolicyError(NOT_AGREED) from None
    for agreement in agreements.values():
        if canonical(agreement.settings) == wanted:
            return agreement
    name = settings.get("name") if isinstance(settings, dict) else None
    known = agreements.get(name) if isinstance(name, str) else None
    if known is None:
        log.warning(
            "asked by a federation that this site has not agreed to; agreed: %s", ", ".join(agreements) or "none"
        )
    else:
        log.warning(
            "federation %s asks with other settings than agreed: %s", name, _differences(known.settings, settings)
        )
    raise PolicyError(NOT_AGREED)


def _differences(agreed: dict[str, Any], asked: dict[str, Any]) -> str:
    """The keys that differ. Values are left out: they are the other side's text."""
    own, theirs = dict(_leaves(agreed, "")), dict(_leaves(asked, ""))
    keys = [key for key in own if key not in theirs or theirs[key] != own[key]]
    more = len(theirs.keys() - own.keys())
    return ", ".join([*keys, *([f"{more} more than agreed"] if more else [])])


def _leaves(values: dict[str, Any], before: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
