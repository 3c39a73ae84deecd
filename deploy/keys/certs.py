"""Certificates and keys of a federation: ``fedspan keys``."""

import argparse
import re
import secrets
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.system.command import Command, number
from common.system.keys import (
    PrivateKey,
    PublicKey,
    fingerprint,
    host_names,
    make_site,
    may_be_in_git,
    read_bytes,
    read_certificates,
    read_private,
    read_public,
    refuse_existing,
    refuse_git,
    write,
    write_new,
)

CA_DAYS, SERVER_DAYS, MAX_DAYS = 3650, 365, 36500
_ALWAYS = ("localhost", "127.0.0.1")  # Flower's own programs reach the SuperLink there
_EARLIER = timedelta(hours=1)  # sites whose clocks are slow accept a new certificate at once
_HOST = re.compile(
    r"^(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$"
)


def make_ca(folder: Path, days: int) -> None:
    """Make a certificate authority, ``ca.key`` and ``ca.crt``, in ``folder``.

    Raises:
        ConfigError: one of the files exists, or cannot be written.
    """
    key_file, file = folder / "ca.key", folder / "ca.crt"
    refuse_existing(key_file, file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror})") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"FedSpan CA {secrets.token_hex(4)}")  # two authorities are told apart by their names
    builder = _certificate(name, name, key.public_key(), datetime.now(UTC) + timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    write_new(key_file, _pem(key), 0o600)
    write_new(file, builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def make_server(folder: Path, hosts: list[str], days: int) -> x509.Certificate:
    """Make or renew the server's certificate, ``server.pem``; its key, ``server.key``, is made once.

    Args:
        folder: holds ``ca.key`` and ``ca.crt``.
        hosts: DNS names and IP addresses besides localhost; none: those of the present certificate.
        days: how long it is valid; it ends with the authority at the latest.

    Raises:
        ConfigError: the authority is missing or has expired, or a file or a name is wrong.
    """
    authority, ca = read_private(folder / "ca.key"), read_certificates(folder / "ca.crt")[0]
    if ca.public_key() != authority.public_key():
        raise ConfigError(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}")
    ends = ca.not_valid_after_utc
    if ends <= datetime.now(UTC):
        raise ConfigError(f"{folder / 'ca.crt'} expired on {ends:%Y-%m-%d}; make another one elsewhere with `ca`")
    key_file, file = folder / "server.key", folder / "server.pem"
    if not hosts and file.exists():
        hosts = host_names(read_certificates(file)[0])
    alternatives = x509.SubjectAlternativeName([_host(h) for h in dict.fromkeys([*hosts, *_ALWAYS])])
    if not key_file.exists():
        write_new(key_file, _pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
    key = read_private(key_file).public_key()
    until = min(ends, datetime.now(UTC) + timedelta(days=days))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    builder = (
        _certificate(_name("FedSpan server"), ca.subject, key, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(issuer, critical=False)
    )
    certificate = builder.sign(authority, hashes.SHA256())
    write(file, certificate.public_bytes(Encoding.PEM))
    return certificate


def describe(path: Path) -> list[str]:
    """Lines that say what a file with certificates or a key is.

    Raises:
        ConfigError: it is neither.
    """
    content = read_bytes(path)
    if b"CERTIFICATE" in content:
        return [line for certificate in read_certificates(path) for line in _facts(certificate)]
    if b"PRIVATE KEY" in content:
        return [f"private key  {fingerprint(read_private(path).public_key())}"]
    return [f"public key  {fingerprint(read_public(path))}"]


def _facts(certificate: x509.Certificate) -> list[str]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(UTC)
    left = "not yet valid" if now < begins else "expired" if now > ends else f"{(ends - now).days} days left"
    issuer = certificate.issuer.rfc4514_string()
    return [
        f"certificate  {certificate.subject.rfc4514_string()}",
        f"  for        {', '.join(host_names(certificate)) or 'no host: it signs others'}",
        f"  issuer     {'itself' if certificate.issuer == certificate.subject else issuer}",
        f"  valid      {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC ({left})",
        f"  SHA-256    {certificate.fingerprint(hashes.SHA256()).hex()}",
    ]


def _certificate(subject: x509.Name, issuer: x509.Name, key: PublicKey, until: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _EARLIER)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    kinds = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    kinds += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{kind: kind in allowed for kind in kinds})


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        if not _HOST.match(text):
            raise ConfigError(f"--host {text!r}: neither a DNS name nor an IP address (without port)") from None
        return x509.DNSName(text)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


_days = number(int, 1, MAX_DAYS, "days")


def _ca_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where ca.key and ca.crt are made")
    parser.add_argument("--days", type=_days, default=CA_DAYS, help=f"how long it is valid (default: {CA_DAYS})")
    may_be_in_git(parser)


def _make_ca(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    refuse_git(folder, options)
    make_ca(folder, options.days)
    print(f"{folder / 'ca.key'} is secret and stays here; {folder / 'ca.crt'} goes to every site")  # noqa: T201


def _server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds ca.key and ca.crt")
    parser.add_argument(
        "--host",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="DNS names and IP addresses of the server (default: those of the present certificate)",
    )
    parser.add_argument(
        "--days", type=_days, default=SERVER_DAYS, help=f"how long it is valid (default: {SERVER_DAYS})"
    )


def _make_server(options: argparse.Namespace) -> None:
    file: Path = options.folder / "server.pem"
    renewed = file.exists()
    certificate = make_server(options.folder, options.host, options.days)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    again = "; a SuperLink that runs reads it when it is started again" if renewed else ""
    print(f"{file} is for {', '.join(host_names(certificate))}, valid until {until}{again}")  # noqa: T201


def _site_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="makes PREFIX.key and PREFIX.pub")
    may_be_in_git(parser)


def _make_site(options: argparse.Namespace) -> None:
    refuse_git(options.prefix, options)
    mark, prefix = make_site(options.prefix), options.prefix
    print(f"{prefix}.key is secret and stays here; give {prefix}.pub to the operator\nfingerprint {mark}")  # noqa: T201


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="certificates and keys")


def _show(options: argparse.Namespace) -> None:
    lines = [line for file in options.files for line in (f"{file}", *(f"  {fact}" for fact in describe(file)))]
    print("\n".join(lines))  # noqa: T201


CA = Command(_ca_arguments, _make_ca, example="pki", then="fedspan keys server pki --host NAME")
SERVER = Command(
    _server_arguments,
    _make_server,
    example="pki --host fl.example.org",
    then="fedspan sites add sites.json NAME NAME.pub",
    notes="Makes DIR/server.key and DIR/server.pem. Run again, it renews the certificate.",
)
SITE = Command(
    _site_arguments,
    _make_site,
    example="site-a",
    then="fedspan site check SITE.yaml --superlink HOST:PORT --auth-supernode-private-key site-a.key ...",
    notes="Made at the hospital: the key stays there, the .pub file goes to the operator.",
)
SHOW = Command(_show_arguments, _show, example="pki/server.pem", then="fedspan keys server pki, to renew a certificate")
