"""Files by which a site knows its server, and its server the site."""

import base64
import hashlib
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from client.checks.finding import Finding, Skip
from client.checks.subject import Subject

_SOON = timedelta(days=30)


def root(subject: Subject) -> Finding:
    """The root certificates can be read and are valid."""
    file = subject.root_certificates
    if file is None:
        raise Skip("needs --root-certificates")
    ask = "ask the operator for the certificate file (ca.crt) again"
    try:
        found = x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:
        return Finding("FAIL", f"{file} cannot be read ({error.strerror})", ask)
    except ValueError:
        return Finding("FAIL", f"{file} holds no certificate in PEM form", ask)
    first = min(found, key=lambda certificate: certificate.not_valid_after_utc)
    return validity(
        f"{file}, {first.subject.rfc4514_string()}",
        first.not_valid_before_utc,
        first.not_valid_after_utc,
        "ask the operator for a new certificate file",
    )


def validity(what: str, start: datetime, end: datetime, mend: str) -> Finding:
    """Whether something is valid now, and for how long."""
    now = datetime.now(UTC)
    if now < start:
        clock = f"set this machine's clock (it says {now:%Y-%m-%d %H:%M} UTC), or {mend}"
        return Finding("FAIL", f"{what}: not valid before {start:%Y-%m-%d %H:%M} UTC", clock)
    if now > end:
        return Finding("FAIL", f"{what}: expired on {end:%Y-%m-%d}", mend)
    if end - now < _SOON:
        return Finding("warning", f"{what}: expires on {end:%Y-%m-%d}, in {(end - now).days} days", mend)
    return Finding("ok", f"{what}: valid until {end:%Y-%m-%d}")


def private_key(subject: Subject) -> Finding:
    """The SuperNode's key can be used, and by its owner alone."""
    file = subject.private_key
    if file is None:
        raise Skip("needs --auth-supernode-private-key")
    make = f'make one: ssh-keygen -t ecdsa -b 384 -N "" -f {file}; then send {file}.pub to the operator'
    try:
        mode = file.stat().st_mode & 0o777
        text = file.read_bytes()
    except OSError as error:
        return Finding("FAIL", f"{file} cannot be read ({error.strerror})", make)
    if mode & 0o077:
        return Finding("FAIL", f"{file} may be read or written by others (mode {mode:03o})", f"chmod 600 {file}")
    try:
        key = load_ssh_private_key(text, password=None)
    except TypeError:
        return Finding("FAIL", f"{file} has a passphrase, which a SuperNode cannot be asked for", make)
    except (ValueError, UnsupportedAlgorithm):
        return Finding("FAIL", f"{file} holds no private key in OpenSSH form", make)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return Finding("FAIL", f"{file} holds a key of another kind than ECDSA", make)
    return Finding("ok", f"{file}, {key.curve.name}, public key {fingerprint(key)}")


def fingerprint(key: ec.EllipticCurvePrivateKey) -> str:
    """Fingerprint of the public key, as ``ssh-keygen -l`` shows it."""
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
