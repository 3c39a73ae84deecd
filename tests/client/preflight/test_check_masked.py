"""The preflight on masked sums."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.privacy.agreement import make_agreement, write_agreement
from common.system.keys import fingerprint
from tests.client.preflight.test_check import Files, files as files, look, output as output

MASKED = {
    "strategy": {"name": "ffa-lora", "rank": 2},
    "cohort": {"min_clients": 3},
    "secure_aggregation": {"threshold": 3},
}


@pytest.fixture
def own(tmp_path: Path) -> ec.EllipticCurvePrivateKey:
    return write_key(tmp_path / "site-a.key", ec.SECP384R1())


def write_key(file: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(curve)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    file.chmod(0o600)
    return key


def agree(files: Files, tmp_path: Path, peers: dict[str, str], least_peers: int = 1) -> None:
    federation = files.subject().settings
    agreement = make_agreement(federation).model_copy(update={"peers": peers, "least_peers": least_peers})
    write_agreement(tmp_path / "site-a-agreements.json", federation.name, agreement)


def test_without_masks_there_is_nothing_to_check(files: Files) -> None:
    assert look("masked sums", files.subject()).level == "skipped"


@pytest.mark.parametrize(
    ("names", "least", "level", "part"),
    [
        (("b", "c"), 1, "ok", "2 other site(s) known (b, c); at least 2 of them"),
        (("b", "c", "d"), 3, "ok", "at least 3 of them"),
        (("b",), 1, "FAIL", "a sum needs 2 beside this one"),
        (("a", "b"), 1, "FAIL", "1 other site(s) known (b); a sum needs 2"),
        ((), 1, "FAIL", "no other site is known"),
    ],
)
def test_peers_are_counted_without_the_site_itself(
    files: Files,
    tmp_path: Path,
    own: ec.EllipticCurvePrivateKey,
    names: tuple[str, ...],
    least: int,
    level: str,
    part: str,
) -> None:
    files.change("federation", **MASKED)
    marks = {name: fingerprint(own.public_key()) if name == "a" else f"SHA256:{name}" for name in names}
    agree(files, tmp_path, marks, least)
    finding = look("masked sums", files.subject(private_key=tmp_path / "site-a.key"))
    assert (finding.level, part in finding.found) == (level, True), finding
    assert ("--peer" in finding.mend) == (level == "FAIL")


def test_key_of_another_curve_fails(files: Files, tmp_path: Path) -> None:
    files.change("federation", **MASKED)
    agree(files, tmp_path, {"b": "SHA256:b", "c": "SHA256:c"})
    write_key(tmp_path / "other.key", ec.SECP256R1())
    assert look("masked sums", files.subject()).level == "skipped"
    finding = look("masked sums", files.subject(private_key=tmp_path / "other.key"))
    assert (finding.level, "no ECDSA P-384 key" in finding.found) == ("FAIL", True)
