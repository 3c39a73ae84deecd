"""Checks of the CA by which the site knows the server, and of the key by which the server knows the site."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from client.preflight.context import CheckContext
from client.preflight.finding import Finding, Skip
from common.errors import ConfigError
from common.system.keys import fingerprint, read_bytes, read_private

_SOON = timedelta(days=30)


def root(subject: CheckContext) -> Finding:
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
    """Whether ``what`` is valid now, and for how long."""
    now = datetime.now(UTC)
    if now < start:
        clock = f"set this machine's clock (it says {now:%Y-%m-%d %H:%M} UTC), or {mend}"
        return Finding("FAIL", f"{what}: not valid before {start:%Y-%m-%d %H:%M} UTC", clock)
    if now > end:
        return Finding("FAIL", f"{what}: expired on {end:%Y-%m-%d}", mend)
    if end - now < _SOON:
        return Finding("warning", f"{what}: expires on {end:%Y-%m-%d}, in {(end - now).days} days", mend)
    return Finding("ok", f"{what}: valid until {end:%Y-%m-%d}")


def private_key(subject: CheckContext) -> Finding:
    """The SuperNode's key can be read, and only its owner can read it."""
    file = subject.private_key
    if file is None:
        raise Skip("needs --auth-supernode-private-key")
    prefix = file.parent / subject.site.name
    make = f"make one: fedspan keys site {prefix}; then send {prefix}.pub to the operator"
    try:
        key, content = read_private(file), read_bytes(file)
    except ConfigError as error:
        found, _, command = str(error).partition("; run: ")
        return Finding("FAIL", found, command or make)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return Finding("FAIL", f"{file} holds a key of another kind than ECDSA", make)
    if b"OPENSSH" not in content:
        return Finding("FAIL", f"{file} is in PEM format, but a SuperNode reads OpenSSH's alone", make)
    return Finding("ok", f"{file}, {key.curve.name}, public key {fingerprint(key.public_key())}")
