"""Vouch for the code that a federation sends to its sites: ``fedspan code``."""

import argparse
import base64
import json
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from client.connect.verify import BUNDLE, SETTINGS, signed_with
from client.privacy.agreement import make_agreement
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.errors import ConfigError, FedSpanError
from common.system.command import Command
from common.system.keys import (
    fingerprint,
    may_be_in_git,
    new_pair,
    read_private,
    read_public,
    read_signature,
    refuse_git,
    write,
    write_new,
)
from server.superlink.bundle import ROOT, bundle_digest


def make_key(prefix: Path) -> str:
    """Make a pair for signing bundles; its fingerprint.

    Raises:
        ConfigError: one of the files exists, or cannot be written.
    """
    private, public = new_pair(prefix)
    key = Ed25519PrivateKey.generate()
    write_new(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    write_new(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return fingerprint(key.public_key())


def sign(key_file: Path, digest: str, form: str = BUNDLE) -> dict[str, str]:
    """Sign a bundle, or a federation's settings, by SHA-256.

    Args:
        key_file: the secret key.
        digest: SHA-256 (hex) of the bundle or the settings.
        form: the signed text with a place for the digest; tells bundles from settings (``client.connect.verify``).

    Raises:
        ConfigError: the key cannot be used.
    """
    key = read_private(key_file)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{key_file}: not an Ed25519 key; make one with: fedspan code key PREFIX")
    return {
        "digest": digest,
        "key": fingerprint(key.public_key()),
        "signature": base64.b64encode(key.sign(form.format(digest).encode())).decode(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def verify(key_file: Path, signature: Path, digest: str) -> str | None:
    """Why a signature does not vouch for the bundle with this SHA-256; None when it does.

    Raises:
        ConfigError: a file cannot be read.
    """
    key, entry = read_public(key_file), read_signature(signature)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{key_file}: not an Ed25519 key")
    if entry["digest"] != digest:
        return f"{signature} is for bundle {entry['digest']}, this one is {digest}"
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    if not signed_with(pem, digest, entry):
        return f"{signature} was not made with the key {fingerprint(key)} of {key_file}"
    return None


def _key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="makes PREFIX.key and PREFIX.pub")
    may_be_in_git(parser)


def _make_key(options: argparse.Namespace) -> None:
    refuse_git(options.prefix, options)
    mark, prefix = make_key(options.prefix), options.prefix
    print(f"{prefix}.key is secret; give {prefix}.pub to the sites\nfingerprint {mark}")  # noqa: T201


def _app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--app", type=Path, default=ROOT, metavar="DIR", help="whose code is meant (default: this project)"
    )


def _sign_arguments(parser: argparse.ArgumentParser) -> None:
    _app(parser)
    parser.add_argument(
        "--federation", type=Path, metavar="FILE", help="sign what this federation file asks of sites, instead of code"
    )
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="secret key to sign with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the signature (default: bundle.sig, or settings.sig)")


def _sign(options: argparse.Namespace) -> None:
    if options.federation is None:
        what, form, digest = "bundle", BUNDLE, bundle_digest(options.app)
    else:
        federation = resolved(load(options.federation, FederationConfig), options.federation)
        what, form, digest = "settings", SETTINGS, make_agreement(federation).digest
    out = options.out or Path(f"{what}.sig")
    write(out, (json.dumps(sign(options.key, digest, form), indent=2) + "\n").encode())
    print(f"{out}: vouches for {what} {digest}")  # noqa: T201


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _app(parser)
    parser.add_argument("--key", type=Path, required=True, metavar="FILE.pub", help="public key of who vouched")
    parser.add_argument("--signature", type=Path, required=True, metavar="FILE", help="that `fedspan code sign` made")


def _verify(options: argparse.Namespace) -> None:
    digest = bundle_digest(options.app)
    wrong = verify(options.key, options.signature, digest)
    if wrong is not None:
        raise FedSpanError(wrong)
    print(digest)  # noqa: T201


KEY = Command(_key_arguments, _make_key, example="reviewer", then="fedspan code sign --key reviewer.key")
DIGEST = Command(
    _app,
    lambda options: print(bundle_digest(options.app)),  # noqa: T201
    example="",
    then="fedspan code sign --key reviewer.key",
    notes="SHA-256 of the app bundle that this project's server ships to the sites.",
)
SIGN = Command(
    _sign_arguments,
    _sign,
    example="--key reviewer.key",
    then="fedspan serve FEDERATION.yaml --signature bundle.sig ...",
    notes="A site whose site file has a section `trust` runs no code but what is signed, or listed there.",
)
VERIFY = Command(
    _verify_arguments,
    _verify,
    example="--key reviewer.pub --signature bundle.sig",
    then="fedspan serve FEDERATION.yaml --signature bundle.sig ...",
    notes="Exit code 1: the code is not signed with that key.",
)
