"""Vouch for the code that a federation sends to its sites: ``python -m deploy.keys.bundle``.

    key PREFIX                     a pair for whoever vouches: PREFIX.key (secret), PREFIX.pub (goes to the sites)
    digest                         SHA-256 of the app bundle that the server would ship
    sign --key FILE                vouch for it; the file goes to ``server.operate.supervise --signature``
    verify --key FILE --signature FILE

A site whose site file has a section ``trust`` runs nothing else. Exit codes: 0 done, 1 not signed with that key, 2 a
file or an argument is wrong.
"""

import argparse
import base64
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from client.connect.verify import signed_message, signed_with
from common.errors import ConfigError, FedSpanError
from common.system.keys import fingerprint, new_pair, read_private, read_public, write, write_new
from server.superlink.bundle import bundle_digest
from server.superlink.signatures import read_signature

ROOT = Path(__file__).resolve().parents[2]


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


def sign(key_file: Path, digest: str) -> dict[str, str]:
    """A signature for the bundle with this SHA-256.

    Raises:
        ConfigError: the key cannot be used.
    """
    key = read_private(key_file)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{key_file}: not an Ed25519 key; make one with: python -m deploy.keys.bundle key PREFIX")
    return {
        "digest": digest,
        "key": fingerprint(key.public_key()),
        "signature": base64.b64encode(key.sign(signed_message(digest))).decode(),
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.keys.bundle", description="Vouch for the app bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    key = commands.add_parser("key", help="make a pair of keys for signing")
    key.add_argument("prefix", type=Path, metavar="PREFIX")
    made = {
        name: commands.add_parser(name, help=text)
        for name, text in (("digest", "SHA-256 of the bundle"), ("sign", "sign it"), ("verify", "check a signature"))
    }
    for command in made.values():
        command.add_argument("--app", type=Path, default=ROOT, metavar="DIR", help="default: this project")
    made["sign"].add_argument("--key", type=Path, required=True, metavar="FILE", help="secret key")
    made["sign"].add_argument("--out", type=Path, default=Path("bundle.sig"), metavar="FILE")
    made["verify"].add_argument("--key", type=Path, required=True, metavar="FILE.pub")
    made["verify"].add_argument("--signature", type=Path, required=True, metavar="FILE")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "key":
            mark, prefix = make_key(options.prefix), options.prefix
            said = f"{prefix}.key is secret; give {prefix}.pub to the sites\nfingerprint {mark}"
        else:
            said = digest = bundle_digest(options.app)
        if options.command == "sign":
            write(options.out, (json.dumps(sign(options.key, digest), indent=2) + "\n").encode())
            said = f"{options.out}: vouches for bundle {digest}"
        elif options.command == "verify" and (wrong := verify(options.key, options.signature, digest)) is not None:
            print(f"error: {wrong}", file=sys.stderr)  # noqa: T201
            return 1
    except FedSpanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(said)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
