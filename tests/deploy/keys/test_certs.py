"""Certificates are what strict checkers want, and nothing is overwritten or left open."""

import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from common.system.keys import host_names, read_certificates
from deploy.cli import main
from tests.harness.processes import ROOT
from tests.harness.programs import needs


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    assert main(["keys", "ca", str(tmp_path / "pki")]) == 0
    return tmp_path / "pki"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def handshake(pki: Path, host: str) -> None:
    """A TLS handshake in memory, with the strict checks that Python 3.13 makes by default."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(pki / "server.pem", pki / "server.key")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_verify_locations(pki / "ca.crt")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].version()


@needs("openssl")
def test_server_certificate_passes_strict_checks_for_all_its_names(pki: Path) -> None:
    assert main(["keys", "server", str(pki), "--host", "fl.example.org", "10.0.0.7", "--host", "2001:db8::1"]) == 0
    for host in ("fl.example.org", "10.0.0.7", "2001:db8::1", "localhost", "127.0.0.1"):
        handshake(pki, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, "other.example.org")
    openssl = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(pki / "ca.crt")]
    subprocess.run([*openssl, str(pki / "server.pem")], check=True, capture_output=True)


def test_renewal_keeps_names_and_key_and_tells_the_new_expiry(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "server", str(pki), "--host", "fl.example.org", "--days", "1"]) == 0
    key, before = (pki / "server.key").read_bytes(), read_certificates(pki / "server.pem")[0]
    assert main(["keys", "server", str(pki)]) == 0
    after = read_certificates(pki / "server.pem")[0]
    assert (pki / "server.key").read_bytes() == key
    assert host_names(after) == host_names(before)
    assert (after.not_valid_after_utc - before.not_valid_after_utc).days == 364
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"valid until {after.not_valid_after_utc:%Y-%m-%d %H:%M} UTC" in said
    assert "fl.example.org" in said


def test_server_certificate_ends_with_the_authority(tmp_path: Path) -> None:
    assert main(["keys", "ca", str(tmp_path), "--days", "3"]) == 0
    assert main(["keys", "server", str(tmp_path)]) == 0
    ca, server = (read_certificates(tmp_path / name)[0] for name in ("ca.crt", "server.pem"))
    assert server.not_valid_after_utc == ca.not_valid_after_utc


@needs("ssh-keygen")
def test_site_pair_is_what_ssh_keygen_and_flower_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "site", str(tmp_path / "site-a")]) == 0
    key = load_ssh_private_key((tmp_path / "site-a.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert key.public_key() == load_ssh_public_key((tmp_path / "site-a.pub").read_bytes())
    mark = capsys.readouterr().out.split()[-1]
    shown = ["ssh-keygen", "-l", "-f", str(tmp_path / "site-a.pub")]
    assert mark in subprocess.run(shown, capture_output=True, text=True, check=True).stdout


def test_secrets_are_private(pki: Path) -> None:
    main(["keys", "server", str(pki)])
    main(["keys", "site", str(pki / "site-a")])
    assert {mode(pki / name) for name in ("ca.key", "server.key", "site-a.key")} == {0o600}


def test_two_makers_of_one_pair_never_mix_theirs(tmp_path: Path) -> None:
    codes: list[int] = []
    makers = [threading.Thread(target=lambda: codes.append(main(["keys", "ca", str(tmp_path)]))) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert sorted(codes) == [0, 2, 2, 2]
    assert main(["keys", "server", str(tmp_path)]) == 0


def expired(pki: Path) -> None:
    import datetime as dt

    with pytest.MonkeyPatch.context() as patch:

        class Past(dt.datetime):
            @classmethod
            def now(cls, tz: object = None) -> dt.datetime:  # type: ignore[override]
                return dt.datetime.now(dt.UTC) - dt.timedelta(days=20)

        patch.setattr("deploy.keys.certs.datetime", Past)
        (pki / "ca.crt").unlink()
        (pki / "ca.key").unlink()
        assert main(["keys", "ca", str(pki), "--days", "10"]) == 0


def foreign(pki: Path) -> None:
    assert main(["keys", "ca", str(pki / "other")]) == 0
    (pki / "ca.crt").write_bytes((pki / "other" / "ca.crt").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "arguments", "says"),
    [
        (None, ["ca", "{pki}"], "ca.key exists and is not overwritten"),
        (None, ["server", "{pki}/none"], "none/ca.key: cannot be read (No such file or directory)"),
        (None, ["server", "{pki}", "--host", "https://x"], "--host 'https://x': neither a DNS name nor an IP address"),
        (lambda pki: (pki / "ca.key").chmod(0o640), ["server", "{pki}"], "(mode 0640); run: chmod 600 "),
        (lambda pki: (pki / "ca.key").write_text("x"), ["server", "{pki}"], "no private key in PEM or OpenSSH format"),
        (lambda pki: (pki / "ca.crt").write_text("x"), ["server", "{pki}"], "ca.crt: no certificate in PEM format"),
        (expired, ["server", "{pki}"], "ca.crt expired on"),
        (foreign, ["server", "{pki}"], "ca.key is not the key of"),
        (None, ["site", "{pki}/none/site-a"], "site-a.key: cannot be written (No such file or directory)"),
        (lambda pki: (pki / "s.pub").touch(), ["site", "{pki}/s"], "s.pub exists and is not overwritten"),
        (lambda pki: (pki / "x").write_text("x"), ["show", "{pki}/x"], "x: no public key in PEM or OpenSSH format"),
    ],
)
def test_mistakes_are_one_clear_line(
    pki: Path, spoil: object, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if callable(spoil):
        spoil(pki)
    before = {path: path.read_bytes() for path in pki.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main(["keys", *(argument.format(pki=pki) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in pki.iterdir() if path.is_file()} == before


def test_show_says_what_a_file_is(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "server", str(pki), "--host", "fl.example.org"])
    main(["keys", "site", str(pki / "site-a")])
    capsys.readouterr()
    assert (
        main(["keys", "show", *(str(pki / name) for name in ("ca.crt", "server.pem", "site-a.pub", "site-a.key"))]) == 0
    )
    said = capsys.readouterr().out
    for part in ("CN=FedSpan CA", "issuer     itself", "fl.example.org, localhost, 127.0.0.1", "364 days left"):
        assert part in said
    public, private = (line.split()[-1] for line in said.splitlines() if "SHA256:" in line)
    assert public == private


@pytest.mark.parametrize("git", ["folder", "file"])
def test_nothing_secret_is_made_in_a_git_work_tree_unless_asked(
    tmp_path: Path, git: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A work tree that `git worktree` made has a file for a .git."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".git").mkdir() if git == "folder" else (tree / ".git").write_text("gitdir: /elsewhere")
    assert main(["keys", "site", str(tmp_path / "site-a")]) == 0
    capsys.readouterr()
    for command, made in (
        (["keys", "ca", str(tree / "below" / "pki")], tree / "below"),
        (["keys", "site", str(tree / "site-a")], tree / "site-a.key"),
        (["code", "key", str(tree / "reviewer")], tree / "reviewer.key"),
        (["sites", "add", str(tree / "sites.json"), "site-a", str(tmp_path / "site-a.pub")], tree / "sites.json"),
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"is in the git work tree {tree}, where it may get committed" in said
        assert not made.exists()
        assert main([*command, "--in-git"]) == 0
        assert made.exists()
        capsys.readouterr()
    assert main(["sites", "revoke", str(tree / "sites.json"), "site-a"]) == 0  # one that is there is edited in place


def test_git_does_not_see_what_the_commands_make(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for command in (["keys", "ca", "pki"], ["keys", "server", "pki"], ["keys", "site", "site-a"], ["code", "key", "r"]):
        at = [str(tmp_path / word) if word == command[-1] else word for word in command]
        assert main([*at, *([] if "server" in command else ["--in-git"])]) == 0
    pub = str(tmp_path / "site-a.pub")
    assert main(["sites", "add", str(tmp_path / "sites.json"), "site-a", pub, "--in-git"]) == 0
    assert main(["code", "sign", "--key", str(tmp_path / "r.key"), "--out", str(tmp_path / "bundle.sig")]) == 0
    seen = subprocess.run(["git", "status", "--short"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert seen == "?? .gitignore\n"
