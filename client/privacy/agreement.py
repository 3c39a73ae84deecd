"""What a site has agreed to: the settings of a federation as sites are sent them, pinned in a file of the site's own.

A message with other settings is refused before data is opened, with one sentence whatever it asks for. The file is
written by ``fedspan site agree`` (``client.privacy.agree``), and by whoever starts sites of its own on one machine.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from common.config.federation import FederationConfig, ModelConfig, settings_for_sites
from common.config.load import parse
from common.config.section import Section, resolve
from common.config.site import SiteConfig
from common.errors import ConfigError, PolicyError
from common.system.files import hold, write_atomically

NOT_AGREED = "this site has not agreed to these settings; its people do so with: fedspan site agree FEDERATION.yaml"
_LOCK_SECONDS = 10.0
log = logging.getLogger(__name__)


class Agreement(Section):
    """One federation that a site takes part in.

    Attributes:
        settings: what sites are sent of its file.
        model: the same of the base model with what is the site's own: where it is, unless the site file says so, and
            which digests it has to have.
        agreed: when, in UTC.
        reviewer: fingerprint of the key that has signed the settings; None: nobody's.
    """

    settings: dict[str, Any]
    model: ModelConfig
    agreed: str
    reviewer: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings, by which people compare them."""
        return hashlib.sha256(_canonical(self.settings).encode()).hexdigest()

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
    """Where a site's agreements are."""
    return resolve(site.agreements or f"{site.name}-agreements.json", site_file)


def make_agreement(federation: FederationConfig, reviewer: str | None = None) -> Agreement:
    """To take part in a federation as its file has it.

    Args:
        federation: with absolute paths (``common.config.federation.resolved``).
        reviewer: see ``Agreement``.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    settings = json.loads(settings_for_sites(federation))
    return Agreement(settings=settings, model=federation.model, agreed=now, reviewer=reviewer)


def read_agreements(file: Path) -> dict[str, Agreement]:
    """All agreements in a file, by the federations' names; none when there is no file.

    Raises:
        ConfigError: it is no file of agreements.
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
    """Add or replace the agreement to a federation, or, with None, take it back.

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


def agree_for_own_sites(file: Path, federation: FederationConfig) -> None:
    """Write the agreement of whoever owns both the federation file and all of the sites."""
    write_agreement(file, federation.name, make_agreement(federation))


def find(agreements: dict[str, Agreement], sent: str) -> Agreement:
    """The agreement to settings that a message brought.

    Args:
        agreements: of the site.
        sent: the settings, as JSON.

    Raises:
        PolicyError: there is none; the sentence is always the same, the site's log says what differs.
    """
    try:
        settings = json.loads(sent)
        wanted = _canonical(settings)
    except (ValueError, RecursionError):
        log.warning("a message's federation settings are no JSON")
        raise PolicyError(NOT_AGREED) from None
    for agreement in agreements.values():
        if _canonical(agreement.settings) == wanted:
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


def _canonical(settings: object) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _differences(agreed: dict[str, Any], asked: dict[str, Any]) -> str:
    """The keys that differ; what is asked instead is the other side's text and is not repeated."""
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
