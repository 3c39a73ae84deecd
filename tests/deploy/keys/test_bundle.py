"""Who vouches for code: the digest is that of what Flower ships, and only a true signature of it counts."""

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from client.connect.verify import BUNDLE, SETTINGS, Trust, refusal
from deploy.cli import main
from tests.harness.programs import needs

APP = Path(__file__).parents[2] / "processes" / "orders_app"


@pytest.fixture
def reviewer(tmp_path: Path) -> Path:
    for name in ("reviewer", "stranger"):
        assert main(["code", "key", str(tmp_path / name)]) == 0
    return tmp_path


def signature(folder: Path, key: str = "reviewer", app: Path = APP) -> dict[str, Any]:
    out = folder / f"{key}.sig"
    assert main(["code", "sign", "--key", str(folder / f"{key}.key"), "--app", str(app), "--out", str(out)]) == 0
    return dict(json.loads(out.read_text()))


def trust(folder: Path, *keys: str, bundles: list[str] | None = None) -> Trust:
    return Trust("site-a", {key: (folder / f"{key}.pub").read_text() for key in keys}, bundles or [])


def test_digest_is_that_of_the_shipped_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["code", "digest", "--app", str(APP)]) == 0
    assert capsys.readouterr().out.strip() == hashlib.sha256(build_fab_from_disk(APP)).hexdigest()


@needs("openssl")
def test_openssl_takes_the_signature_too(reviewer: Path) -> None:
    made = signature(reviewer)
    (reviewer / "message").write_bytes(f"FedSpan app bundle, signature version 1, sha256 {made['digest']}\n".encode())
    (reviewer / "raw").write_bytes(base64.b64decode(made["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", str(reviewer / "reviewer.pub")]
    command += ["-in", str(reviewer / "message"), "-sigfile", str(reviewer / "raw")]
    subprocess.run(command, check=True, capture_output=True)


def test_bundle_is_trusted_when_signed_or_pinned_and_only_then(reviewer: Path) -> None:
    content = build_fab_from_disk(APP)
    digest = hashlib.sha256(content).hexdigest()
    ours, strangers = signature(reviewer), signature(reviewer, "stranger")
    both = trust(reviewer, "reviewer")
    assert refusal(content, json.dumps([strangers, ours]), both) is None
    assert refusal(content, None, trust(reviewer, bundles=[digest])) is None
    for wrong in (
        None,
        "",
        "not JSON",
        "[" * 100_000,
        json.dumps(ours),  # not in a list
        json.dumps([strangers]),
        json.dumps([{**ours, "signature": strangers["signature"]}]),
        json.dumps([{**ours, "signature": "%"}]),
        json.dumps([{**ours, "signature": 7}]),
        json.dumps([{"digest": digest}, "text", None]),
    ):
        told = refusal(content, wrong, both)
        assert told is not None
        assert told.startswith(f"site-a: the app bundle {digest} is not signed by a key in its trust list")
        assert told.endswith("nothing of it was run")
    changed = content + b"\0"
    told = refusal(changed, json.dumps([ours]), both)
    assert told is not None
    assert f"the signatures that came with it are for {digest[:16]}" in told
    other = {**ours, "digest": hashlib.sha256(changed).hexdigest()}  # the same signature with another claim
    assert refusal(changed, json.dumps([other]), both) is not None


def test_signed_message_names_its_purpose() -> None:
    assert BUNDLE.format("ab") == "FedSpan app bundle, signature version 1, sha256 ab\n"
    assert SETTINGS.format("ab") == "FedSpan federation settings, signature version 1, sha256 ab\n"


def test_verify_tells_right_from_wrong(reviewer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signature(reviewer)
    changed = tmp_path / "changed"
    shutil.copytree(APP, changed)
    client = changed / "orders_client.py"
    client.write_text(client.read_text() + "\n# one more line\n")
    pub, sig = str(reviewer / "reviewer.pub"), str(reviewer / "reviewer.sig")
    assert main(["code", "verify", "--key", pub, "--signature", sig, "--app", str(APP)]) == 0
    assert main(["code", "verify", "--key", pub, "--signature", sig, "--app", str(changed)]) == 1
    assert "reviewer.sig is for bundle" in capsys.readouterr().err
    stranger = str(reviewer / "stranger.pub")
    assert main(["code", "verify", "--key", stranger, "--signature", sig, "--app", str(APP)]) == 1
    assert "was not made with the key SHA256:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["key", "{0}/reviewer"], "reviewer.key exists and is not overwritten"),
        (["digest", "--app", "{0}"], "cannot be bundled"),
        (["sign", "--app", str(APP), "--key", "{0}/none"], "none: cannot be read"),
        (["sign", "--app", str(APP), "--key", "{0}/reviewer.pub"], "(mode 0644); run: chmod 600"),
        (["verify", "--app", str(APP), "--key", "{0}/reviewer.pub", "--signature", "{0}/reviewer.pub"], "no signature"),
        (["verify", "--app", str(APP), "--key", "{0}/reviewer.key", "--signature", "x"], "this is a private key"),
    ],
)
def test_mistakes_are_one_clear_line(
    reviewer: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["code", *(argument.format(reviewer) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
