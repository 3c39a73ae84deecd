"""Keys and certificates in files: private keys that nobody else can read, fingerprints as ``ssh-keygen -l`` shows."""

import argparse
import base64
import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
    ssh_key_fingerprint,
)

from common.errors import ConfigError
from common.system import files

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)  # raised by cryptography for unreadable keys

_SIGNATURE = ("digest", "key", "signature", "made")


def fingerprint(key: PublicKey) -> str:
    """``SHA256:`` and 43 characters, as ``ssh-keygen -l`` shows them."""
    return "SHA256:" + base64.b64encode(ssh_key_fingerprint(key, hashes.SHA256())).decode().rstrip("=")


def read_private(path: Path) -> PrivateKey:
    """A private key in PEM or OpenSSH's format, without a passphrase.

    Raises:
        ConfigError: the file cannot be read, is no such key, or others on this machine can read it.
    """
    content = read_bytes(path)
    about = path.stat()
    mode = stat.S_IMODE(about.st_mode)
    # A readable file of another account is mounted for our group, as Kubernetes does with secrets.
    if mode & (0o077 if about.st_uid == os.geteuid() else 0o007):
        raise ConfigError(f"{path}: this private key can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    try:
        load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
        key = load(content, None)
    except _UNREADABLE:
        raise ConfigError(f"{path}: no private key in PEM or OpenSSH format without a passphrase") from None
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"{path}: a {type(key).__name__}; allowed: ECDSA and Ed25519 keys")
    return key


def read_public(path: Path) -> PublicKey:
    """A public key in PEM or OpenSSH's format.

    Raises:
        ConfigError: the file cannot be read, or is no such key.
    """
    content = read_bytes(path)
    if b"PRIVATE KEY" in content:
        raise ConfigError(f"{path}: this is a private key, which stays where it was made; give the .pub file")
    try:
        key = load_pem_public_key(content) if b"-----BEGIN" in content else load_ssh_public_key(content)
    except _UNREADABLE:
        raise ConfigError(f"{path}: no public key in PEM or OpenSSH format") from None
    if not isinstance(key, PublicKey):
        raise ConfigError(f"{path}: a {type(key).__name__}; allowed: ECDSA and Ed25519 keys")
    return key


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM file, one at least.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    try:
        return x509.load_pem_x509_certificates(read_bytes(path))
    except ValueError:
        raise ConfigError(f"{path}: no certificate in PEM format") from None


def host_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def read_signature(path: Path) -> dict[str, str]:
    """A file that ``fedspan code sign`` made.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        entry = json.loads(read_bytes(path))
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in _SIGNATURE):
        raise ConfigError(f"{path}: no signature; make one with: fedspan code sign")
    return {key: entry[key] for key in _SIGNATURE}


def new_pair(prefix: Path) -> tuple[Path, Path]:
    """Paths for a new private and public key: ``prefix`` with .key and .pub.

    Raises:
        ConfigError: one of the files exists.
    """
    private, public = (prefix.parent / f"{prefix.name}.{ending}" for ending in ("key", "pub"))
    refuse_existing(private, public)
    return private, public


def make_site(prefix: Path) -> str:
    """Make a site's pair as Flower's node authentication reads it: ECDSA P-384 in OpenSSH's format; its fingerprint.

    Raises:
        ConfigError: one of the files exists, or cannot be written.
    """
    private, public = new_pair(prefix)
    key = ec.generate_private_key(ec.SECP384R1())
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {prefix.name}\n".encode()
    write_new(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    write_new(public, text)
    return fingerprint(key.public_key())


def may_be_in_git(parser: argparse.ArgumentParser) -> None:
    """The option of every command that makes what should not be committed; see ``refuse_git``."""
    parser.add_argument("--in-git", action="store_true", help="also in a git work tree, where it may get committed")


def refuse_git(path: Path, options: argparse.Namespace) -> None:
    """Raise a ConfigError when a file or folder that is about to be made would lie in a git work tree, unasked."""
    place = path.resolve()
    found = next((folder for folder in (place, *place.parents) if (folder / ".git").exists()), None)
    if found is not None and not options.in_git:
        raise ConfigError(
            f"{path}: is in the git work tree {found}, where it may get committed; make it in a folder outside, such "
            f"as {Path.home() / 'fedspan'}, or give --in-git"
        )


def refuse_existing(*paths: Path) -> None:
    """Raise a ConfigError when one of the files exists."""
    for path in paths:
        if path.exists():
            raise _exists(path)


def write(path: Path, content: bytes) -> None:
    """Replace a whole file, or leave it as it is.

    Raises:
        ConfigError: it cannot be written.
    """
    with _explained(path):
        files.write_atomically(path, content)


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that does not exist yet; of two that try, one fails.

    Raises:
        ConfigError: it exists, or cannot be written.
    """
    with _explained(path):
        files.write_new(path, content, mode)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists and is not overwritten; move it away or choose another name")
