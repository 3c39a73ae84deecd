"""Show a federation's settings in plain words and pin the site's consent: ``fedspan site agree`` (decision 027)."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from client.connect.trust import read_trust
from client.connect.verify import SETTINGS, signed_with
from client.privacy.agreement import Agreement, agreements_of, make_agreement, read_agreements, write_agreement
from client.watch.asked import asked
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError, ModelError, PolicyError
from common.system.command import Command, number
from common.system.keys import fingerprint, read_public, read_signature
from common.text import one_line

_WIDTH, _COLUMNS = 14, 100  # characters of a line's head, and of the rest


def proposed(
    site_file: Path,
    federation_file: Path,
    signature: Path | None = None,
    peers: Sequence[Path] = (),
    least_peers: int | None = None,
) -> Agreement:
    """The agreement that a site would make.

    Args:
        site_file: the site file.
        federation_file: the operator's federation file, on this machine.
        signature: a reviewer's signature of the settings, made with ``fedspan code sign --federation``.
        peers: public keys of the sites with which this one lets its update be added up; none: those of its agreement
            to a federation of this name.
        least_peers: see ``Agreement``; None: as in that agreement.

    Raises:
        ConfigError: a file is wrong.
        ModelError: the site has no folder of the base model.
        PolicyError: the signature that the site's `trust.settings` asks for is missing, or is none.
    """
    site = load(site_file, SiteConfig)
    federation = resolved(load(federation_file, FederationConfig), federation_file)
    model = federation.model
    if (
        site.model is None
        and model.hub is None
        and (model.path is None or not Path(model.path, "config.json").is_file())
    ):
        where = "names no folder" if model.path is None else f"names {model.path}, where no model is"
        raise ModelError(f"{federation_file}: `model` {where}; write in {site_file}: `model: FOLDER`")
    agreement = make_agreement(federation)
    before = read_agreements(agreements_of(site, site_file)).get(federation.name, agreement)
    known = _peers(federation, peers) or before.peers
    if federation.secure_aggregation is not None and len(known) < federation.secure_aggregation.threshold - 1:
        raise ConfigError(
            f"{federation_file}: `secure_aggregation` adds this site's update to those of others; give --peer FILE.pub "
            f"for each, {federation.secure_aggregation.threshold - 1} at least; {len(known)} known"
        )
    if least_peers is not None and least_peers > len(known):
        raise ConfigError(f"--least-peers is {least_peers}; {len(known)} peers known; give --peer FILE.pub for each")
    reviewer = _reviewer(site_file, site, agreement.digest, signature)
    told = {"reviewer": reviewer, "peers": known, "least_peers": least_peers or before.least_peers}
    return agreement.model_copy(update=told)


def _peers(federation: FederationConfig, files: Sequence[Path]) -> dict[str, str]:
    """Fingerprints of public keys, by the files' names."""
    if files and federation.secure_aggregation is None:
        raise ConfigError("--peer names sites for `secure_aggregation`, which this federation does not have")
    found = {file.stem: fingerprint(read_public(file)) for file in files}
    if len(set(found.values())) < len(files):
        raise ConfigError("--peer: two files have one name, or one key; each site has a key of its own")
    return found


def _reviewer(site_file: Path, site: SiteConfig, digest: str, signature: Path | None) -> str | None:
    """Fingerprint of the trusted key that has signed settings; None where no signature is given, nor asked for."""
    if signature is None:
        if site.trust is not None and site.trust.settings:
            raise PolicyError(
                f"{site_file}: `trust.settings` asks for a reviewer's signature of the settings; give --signature FILE"
            )
        return None
    trust, entry = read_trust(site_file), read_signature(signature)
    if trust is None or not any(signed_with(key, digest, entry, SETTINGS) for key in trust.keys.values()):
        raise PolicyError(
            f"{signature}: not a signature of settings {digest} with a key of `trust.keys` in {site_file}"
        )
    return entry["key"]


def explained(site: SiteConfig, agreement: Agreement) -> str:
    """An agreement in plain words, all settings below."""
    lines = [f"Federation {agreement.federation.name}, settings {agreement.digest}", ""]
    for head, text in asked(site, agreement):
        first, *rest = textwrap.wrap(one_line(text), _COLUMNS)
        lines += [f"  {head:{_WIDTH}} {first}", *(f"  {'':{_WIDTH}} {line}" for line in rest)]
    settings = yaml.safe_dump(agreement.settings, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return "\n".join([*lines, "", "  All settings:", "", *(f"    {line}" for line in settings.splitlines())])


def agree(site_file: Path, agreement: Agreement) -> str:
    """Pin an agreement; returns a sentence about it."""
    file = agreements_of(load(site_file, SiteConfig), site_file)
    name = agreement.federation.name
    write_agreement(file, name, agreement)
    return f"agreed to federation {name}, settings {agreement.digest}; written to {file}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "federation", type=Path, nargs="?", metavar="FEDERATION.yaml", help="the operator's; none: list what is agreed"
    )
    parser.add_argument("--site", type=Path, required=True, metavar="SITE.yaml", help="the site file")
    parser.add_argument("--signature", type=Path, metavar="FILE", help="a reviewer's, of these settings")
    parser.add_argument(
        "--peer",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.pub",
        help="for secure_aggregation: another site's public key, compared with its people; once for each",
    )
    parser.add_argument(
        "--least-peers",
        type=number(int, 1, unit="sites"),
        metavar="N",
        help="so many of them must be in a sum, beside this site (default: one less than the threshold)",
    )
    parser.add_argument("--yes", action="store_true", help="agree without being asked")
    parser.add_argument("--withdraw", metavar="NAME", help="take back the agreement to this federation")


def _run(options: argparse.Namespace) -> int | None:
    site: Path = options.site.resolve()
    config = load(site, SiteConfig)
    file = agreements_of(config, site)
    if options.withdraw is not None:
        if options.federation is not None or options.withdraw not in read_agreements(file):
            known = ", ".join(read_agreements(file)) or "none"
            raise ConfigError(f"--withdraw takes the name of an agreed federation, and no file; agreed: {known}")
        write_agreement(file, options.withdraw, None)
        _say(f"{options.withdraw}: no longer agreed to; a message of it is refused from now on")
        return None
    if options.federation is None:
        for name, one in read_agreements(file).items():
            _say(f"{name}: settings {one.digest}, agreed {one.agreed}, reviewed by {one.reviewer or 'nobody'}")
        return None
    agreement = proposed(site, options.federation, options.signature, options.peer, options.least_peers)
    _say(explained(config, agreement) + "\n")
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError("nothing was agreed to: nobody can be asked here; give --yes")
        if input("Agree? [y/N] ").strip().lower() not in ("y", "yes"):
            _say("nothing was agreed to")
            return 1
    _say(agree(site, agreement))
    return None


def _say(text: str) -> None:
    print(text)  # noqa: T201


AGREE = Command(
    _arguments,
    _run,
    example="FEDERATION.yaml --site site-a.yaml",
    then="fedspan site check site-a.yaml --federation FEDERATION.yaml",
    notes="Shows what the federation would train, how often, and what would leave; then pins these settings. A site\n"
    "answers no message with other ones. Whoever changes the federation file must be agreed with anew.",
)
