"""Invite a site: ``fedspan server invite SITE ...`` packs all that a hospital needs into one archive."""

import argparse
import hashlib
import json
from pathlib import Path

import yaml

from common.config.federation import FederationConfig
from common.errors import ConfigError
from common.system.command import Command, address
from common.system.keys import (
    may_be_in_git,
    read_bytes,
    read_certificates,
    read_public,
    read_signature,
    refuse_git,
    write_new,
)
from deploy.invitation import archive
from deploy.invitation.site_file import site_file


def invitation(options: argparse.Namespace) -> tuple[str, bytes]:
    """Make an invitation; return the federation's name and the archive.

    Raises:
        ConfigError: a file or an argument is wrong.
        ModelError: the base model cannot be loaded, or is not the one that the federation file names.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from common.config.federation import as_invited, check_source, resolved
    from common.config.load import load

    source = options.federation.resolve()
    federation = resolved(load(source, FederationConfig), source)
    check_source(federation, source)
    certificates = read_certificates(options.root_certificates)  # and no key that lies in the same file
    files = {archive.CA: b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)}
    if options.reviewer is not None:
        public = read_public(options.reviewer)
        if not isinstance(public, Ed25519PublicKey):
            raise ConfigError(f"{options.reviewer}: no Ed25519 key, as `fedspan code key` makes them")
        files[archive.REVIEWER] = key = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if options.signature is not None:
            files[archive.SIGNATURE] = _signature(options.signature, key.decode(), federation, source)
    elif options.signature is not None:
        raise ConfigError("--signature needs --reviewer, whose it is")
    invited = as_invited(federation, *_digests(federation, source))
    files[archive.FEDERATION] = _text(invited).encode()
    own = federation.evaluation.server
    values = {"prompt": options.prompt or (own and own.prompt), "answer": options.answer or (own and own.answer)}
    trust = {"keys": [archive.REVIEWER]} if archive.REVIEWER in files else None
    files[archive.SITE] = site_file(options.site, invited, {**values, "trust": trust}).encode()
    return invited.name, archive.pack(options.site, invited.name, options.superlink, files)


def _signature(file: Path, key: str, federation: FederationConfig, source: Path) -> bytes:
    """The content of a file with a reviewer's signature, checked against the settings that sites are sent."""
    from client.connect.verify import SETTINGS, signed_with
    from client.privacy.agreement import make_agreement

    if not signed_with(key, make_agreement(federation).digest, read_signature(file), SETTINGS):
        raise ConfigError(
            f"{file}: does not vouch for the settings of {source} with the key of --reviewer; sign them anew"
        )
    return read_bytes(file)


def _text(invited: FederationConfig) -> str:
    from common.config.federation import settings_for_sites

    settings = json.loads(settings_for_sites(invited))
    settings["model"] |= {"digest": invited.model.digest, "tokenizer_digest": invited.model.tokenizer_digest}
    head = (
        f"# What federation {invited.name} asks of a site, defaults filled in; docs/reference.md explains the keys.\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _digests(federation: FederationConfig, source: Path) -> tuple[str, str]:
    """Digests of the loaded base model and of its tokenizer."""
    from common.data.tasks import make_task
    from common.errors import ModelError
    from common.model.quantization import Held
    from common.protocol.digest import base_digest, tokenizer_digest

    model = federation.model
    task, held = make_task(federation.task), Held(model.quantization, federation.strategy)
    base = task.load(str(model.path or model.hub), model.revision, model.dtype, federation.training.seed, held)
    found = base_digest(base.model), tokenizer_digest(base.tokenizer)
    if (wrong := model.difference(*found)) is not None:
        raise ModelError(f"{source}: {wrong}")
    return found


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", metavar="SITE", help="name of the site")
    parser.add_argument("--federation", type=Path, required=True, metavar="FEDERATION.yaml", help="the federation file")
    parser.add_argument(
        "--superlink", type=address, required=True, metavar="HOST:PORT", help="where the site reaches the server"
    )
    parser.add_argument(
        "--root-certificates", type=Path, required=True, metavar="FILE", help="ca.crt of `fedspan keys ca`"
    )
    parser.add_argument("--reviewer", type=Path, metavar="FILE.pub", help="public key of who signs the code")
    parser.add_argument("--signature", type=Path, metavar="FILE", help="the reviewer's, of the federation's settings")
    parser.add_argument("--prompt", help="for the site file: column or template (default: as in `evaluation.server`)")
    parser.add_argument("--answer", help="likewise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the archive (default: FEDERATION-SITE.zip)")
    may_be_in_git(parser)


def _run(options: argparse.Namespace) -> None:
    name, content = invitation(options)
    out: Path = options.out or Path(f"{name}-{options.site}.zip")
    refuse_git(out, options)
    write_new(out, content)
    print(  # noqa: T201
        f"{out}: invites {options.site} to {name}; no secret is in it\n"
        f"SHA-256 {hashlib.sha256(content).hexdigest()}, which the site is shown as well"
    )


INVITE = Command(
    _arguments,
    _run,
    example="site-a --federation FEDERATION.yaml --superlink fl.example.org:9092 --root-certificates pki/ca.crt "
    "--reviewer reviewer.pub",
    then="fedspan sites add sites.json site-a site-a.pub, when the site has sent its public key",
    notes="The archive holds ca.crt, the server's address, the reviewer's key, the settings that sites are sent, with\n"
    "digests of the base model, and a site file that lacks only what the site alone knows.",
)
