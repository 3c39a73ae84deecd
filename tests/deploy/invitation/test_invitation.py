"""An invitation: what the operator packs, the hospital unpacks, checks and completes; and what it refuses."""

import hashlib
import io
import json
import random
import shlex
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.privacy.agreement import make_agreement
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError
from deploy.invitation import archive
from deploy.sandbox.tiny import make_federation
from tests.harness.command import fedspan

AT = "fl.example.org:9092"


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's folder, with an archive for site-a."""
    folder = tmp_path_factory.mktemp("operator")
    make_federation(folder, {"site-a": 9, "site-b": 17}, training={"max_grad_norm": None})
    for command in (["keys", "ca", folder / "pki"], ["code", "key", folder / "reviewer"]):
        assert fedspan(*command)[0] == 0
    code, said = invite(folder, folder / "tiny-site-a.zip")
    assert code == 0, said
    assert hashlib.sha256((folder / "tiny-site-a.zip").read_bytes()).hexdigest() in said
    return folder


def invite(folder: Path, out: Path, *options: object, federation: str = "federation.yaml") -> tuple[int, str]:
    at = ["--superlink", AT, "--root-certificates", folder / "pki" / "ca.crt", "--reviewer", folder / "reviewer.pub"]
    return fedspan("server", "invite", "site-a", "--federation", folder / federation, *at, "--out", out, *options)


@pytest.fixture
def sent(operator: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny-site-a.zip"
    file.write_bytes((operator / file.name).read_bytes())
    return file


def accept(file: Path, *options: object) -> tuple[int, str]:
    return fedspan("site", "accept", file, "--to", file.with_name("laid-out"), *options)


def test_archive_is_the_same_each_time_and_names_nothing_of_the_operators_machine(operator: Path, sent: Path) -> None:
    again = sent.with_name("again.zip")
    assert invite(operator, again)[0] == 0
    assert again.read_bytes() == sent.read_bytes()
    _, files = archive.unpack(sent)
    assert set(files) == {"ca.crt", "federation.yaml", "site.yaml", "reviewer.pub"}
    assert not [name for name, content in files.items() if str(operator).encode() in content]
    assert not [name for name, content in files.items() if b"PRIVATE" in content]
    config = yaml.safe_load(files["federation.yaml"])
    assert not {"local", "checkpoint", "path"} & {*config, *config["model"], *config["evaluation"]}
    assert config["admission"].keys() == {"max_noise", "max_rows"}


def test_private_key_beside_the_certificate_is_not_packed(operator: Path, sent: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((operator / "pki" / "ca.key").read_bytes() + (operator / "pki" / "ca.crt").read_bytes())
    assert invite(operator, tmp_path / "again.zip", "--root-certificates", both)[0] == 0
    assert (tmp_path / "again.zip").read_bytes() == sent.read_bytes()


def test_accepted_site_lacks_nothing_and_is_asked_for_what_it_agreed_to(operator: Path, sent: Path) -> None:
    code, said = accept(sent, "--data", operator / "site-a.jsonl", "--model", operator / "model")
    assert code == 0, said
    folder = sent.with_name("laid-out")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (folder, *folder.iterdir())}
    assert modes.pop("site-a.pub") in (0o600, 0o644)
    assert modes.pop("laid-out") == 0o700
    assert set(modes.values()) == {0o600}
    site, federation = load(folder / "site.yaml", SiteConfig), load(folder / "federation.yaml", FederationConfig)
    assert (site.data.prompt, site.data.answer) == ("term", "title")  # as the server's own set has them
    assert site.policy.federations == ["tiny"]
    assert Session(site, folder / "site.yaml", federation).hello().site == "site-a"  # the digests are checked here
    theirs = load(operator / "federation.yaml", FederationConfig)
    assert make_agreement(federation).digest == make_agreement(resolved(theirs, operator / "federation.yaml")).digest


def test_commands_that_are_left_to_do_are_in_order_and_understood(operator: Path, sent: Path) -> None:
    from deploy import cli

    manifest, files = archive.unpack(sent)
    code, said = accept(sent)
    assert code == 0
    folder = sent.with_name("laid-out")
    assert "fill in what says FILL-IN" in said
    from deploy.invitation.accept import left_to_do

    lines = left_to_do(folder, manifest, files)
    assert all(" ".join(line.split()) in said for line in lines)
    assert lines[0] == f"cd {folder}"
    commands = [shlex.split(line) for line in lines if line.startswith("fedspan ")]
    assert [" ".join(words[1:3]) for words in commands] == ["site agree", "site check", "site join"]
    for words in commands:
        verb = " ".join(words[1:3])
        cli.parser(verb, cli.load(verb)).read(words[3:])
    named = {word for words in commands for word in words if (folder / word).exists()}
    assert named == {"site.yaml", "federation.yaml", "ca.crt", "site-a.key"}
    assert fedspan("sites", "add", folder / "sites.json", "site-a", folder / "site-a.pub")[0] == 0


def test_where_updates_are_masked_the_other_sites_keys_are_asked_for(operator: Path, tmp_path: Path) -> None:
    sent, config = tmp_path / "tiny-site-a.zip", yaml.safe_load((operator / "federation.yaml").read_text())
    strategy = {"name": "fedftg", "subspace": "shared", "rank": 2}
    masked = {**config, "strategy": strategy, "secure_aggregation": {"threshold": 2}}
    (operator / "masked.yaml").write_text(yaml.safe_dump(masked))
    assert invite(operator, sent, federation="masked.yaml")[0] == 0
    code, said = accept(sent, "--model", operator / "model")
    assert code == 0
    assert " ".join(said.split()).index("# add --peer FILE.pub to the next line") < said.index("fedspan site agree")


def test_reviewers_signature_of_the_settings_goes_along_and_is_agreed_with(operator: Path, tmp_path: Path) -> None:
    sent, signature = tmp_path / "tiny-site-a.zip", tmp_path / "s.sig"
    sign = ["code", "sign", "--key", operator / "reviewer.key", "--federation", operator / "federation.yaml"]
    assert fedspan(*sign, "--out", signature)[0] == 0
    assert invite(operator, sent, "--signature", signature)[0] == 0
    code, said = accept(sent, "--model", operator / "model")
    assert code == 0
    assert "fedspan site agree federation.yaml --site site.yaml --signature settings.sig" in said
    at = sent.with_name("laid-out")
    agree = ["site", "agree", at / "federation.yaml", "--site", at / "site.yaml", "--signature", at / "settings.sig"]
    assert fedspan(*agree, "--yes")[0] == 0
    config = yaml.safe_load((operator / "federation.yaml").read_text())
    (operator / "longer.yaml").write_text(yaml.safe_dump({**config, "rounds": 9}))
    code, said = invite(operator, tmp_path / "x.zip", "--signature", signature, federation="longer.yaml")
    assert (code, "does not vouch for the settings of" in said) == (2, True), said


def test_model_of_the_hub_is_named_in_the_site_file(sent: Path) -> None:
    def to_hub(files: dict[str, bytes]) -> None:
        config = yaml.safe_load(files["federation.yaml"])
        config["model"] |= {"hub": "example/tiny", "revision": "c0ffee"}
        files["federation.yaml"] = yaml.safe_dump(config).encode()

    repack(sent, to_hub)
    assert accept(sent)[0] == 0
    site = load(sent.with_name("laid-out") / "site.yaml", SiteConfig)
    assert site.model is not None
    assert (site.model.path, site.model.hub, site.model.revision) == (None, "example/tiny", "c0ffee")


def test_pair_of_keys_that_is_there_is_kept_and_nothing_is_overwritten(sent: Path) -> None:
    folder = sent.with_name("laid-out")
    folder.mkdir()
    mark = fedspan("keys", "site", folder / "site-a")[1].split()[-1]
    key = (folder / "site-a.key").read_bytes()
    code, said = accept(sent)
    assert code == 0
    assert mark in said
    assert (folder / "site-a.key").read_bytes() == key
    before = {file: file.read_bytes() for file in folder.iterdir()}
    code, said = accept(sent)
    assert code == 2
    assert "exists and is not overwritten" in said
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def repack(file: Path, change: Callable[[dict[str, bytes]], None], **about: Any) -> None:
    """Change an archive as somebody would who knows its format: the manifest fits."""
    manifest, files = archive.unpack(file)
    change(files)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    told = {**manifest.model_dump(), "files": hashes, **about}
    zipped(file, {"manifest.json": json.dumps(told).encode(), **files})


def zipped(file: Path, files: dict[str, bytes], *, link: str = "", packed: bool = False, twice: str = "") -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name == link else stat.S_IFREG) | 0o777) << 16
            info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            made.writestr(info, content)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                made.writestr(twice, b"")


def add_to_site(text: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files["site.yaml"] += text.encode()

    return change


def keep_in(folder: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files["site.yaml"] = files["site.yaml"].replace(b"model: models\n", f"model: {folder}\n".encode())

    return change


def set_in_federation(**keys: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files["federation.yaml"] = yaml.safe_dump({**yaml.safe_load(files["federation.yaml"]), **keys}).encode()

    return change


def nothing(files: dict[str, bytes]) -> None:
    """The files are as they were."""


@pytest.mark.parametrize(
    ("change", "about", "says"),
    [
        (nothing, {"format": 2}, "an invitation of format '2', this FedSpan reads format 1; take the version"),
        (nothing, {"kind": "something"}, "no invitation (no manifest.json of one)"),
        (nothing, {"site": "../site-a"}, "`site` is '../site-a'"),
        (nothing, {"site": "site-b"}, "its files are for site-a in tiny, the manifest says otherwise"),
        (nothing, {"site": "reviewer"}, "'reviewer' is no name for a site here"),
        (nothing, {"superlink": "x:1; rm -rf ~"}, "`superlink` is 'x:1; rm -rf ~'"),
        (nothing, {"files": {}}, "ca.crt is not what the manifest says; ask the operator for the archive again"),
        (lambda files: files.pop("ca.crt"), {}, "lacks ca.crt"),
        (lambda files: files.update({"run.sh": b"#!/bin/sh"}), {}, "holds 'run.sh'; allowed: ca.crt, federation.yaml"),
        (lambda files: files.update({"../ca.crt": b""}), {}, "holds '../ca.crt'"),
        (lambda files: files.update({"ca.crt": b"none"}), {}, "ca.crt: no certificate in PEM format"),
        (lambda files: files.update({"reviewer.pub": b"none"}), {}, "reviewer.pub: no public key in PEM"),
        (add_to_site("ledger: /tmp/x\n"), {}, "site.yaml: sets `ledger`, which is for the site alone to decide"),
        (add_to_site("  max_rounds: 9\n"), {}, "site.yaml: sets `policy.max_rounds`"),
        (keep_in("/etc"), {}, "site.yaml: `keep` is for the site alone to decide; allowed in an invitation: {'model'"),
        (
            set_in_federation(model={"path": "/etc", "digest": "0" * 64}),
            {},
            "names files of the operator's own machine",
        ),
        (set_in_federation(rounds=0), {}, "federation.yaml: `rounds` is 0"),
    ],
)
def test_archive_that_is_not_as_it_should_be_is_refused(
    sent: Path, change: Callable[[dict[str, bytes]], None], about: dict[str, Any], says: str
) -> None:
    repack(sent, change, **about)
    code, said = accept(sent)
    assert code == 2, said
    assert says in said
    assert said.startswith(f"error: {sent}: ")
    assert not sent.with_name("laid-out").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"link": "ca.crt"}, "ca.crt is no plain file that `fedspan server invite` has packed"),
        ({"packed": True}, "is no plain file that `fedspan server invite` has packed"),
        ({"twice": "ca.crt"}, "holds ca.crt twice"),
    ],
)
def test_links_packed_files_and_doubles_are_refused(sent: Path, how: dict[str, Any], says: str) -> None:
    with zipfile.ZipFile(sent) as read:
        files = {name: read.read(name) for name in read.namelist()}
    zipped(sent, files, **how)
    code, said = accept(sent)
    assert (code, says in said) == (2, True), said


def test_large_archive_is_not_even_read(sent: Path) -> None:
    sent.write_bytes(b"\0" * (2**20 + 1))
    code, said = accept(sent)
    assert (code, "no invitation: 1,048,577 bytes; allowed: 1,048,576" in said) == (2, True), said


def test_changed_byte_anywhere_is_refused_with_one_line_or_changes_nothing(sent: Path) -> None:
    """Some bytes of a zip carry nothing: times, and attributes but for the kind of file."""
    whole, random_ = sent.read_bytes(), random.Random(0)
    manifest, files = archive.unpack(sent)
    refused = 0
    for place in random_.sample(range(len(whole)), 400):
        sent.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random_.randrange(8))]) + whole[place + 1 :])
        try:
            assert archive.unpack(sent) == (manifest, files)
        except ConfigError:
            refused += 1
    assert refused > 300
    for length in random_.sample(range(len(whole)), 100):
        sent.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            archive.unpack(sent)


def test_archive_whose_sizes_lie_is_refused(sent: Path) -> None:
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as made:
            made.writestr("manifest.json", b"x" * 100)
        data = bytearray(out.getvalue())
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = (2**31).to_bytes(4, "little")
    sent.write_bytes(data)
    code, said = accept(sent)
    assert (code, "its files hold more than 1,048,576 bytes" in said) == (2, True), said


@pytest.mark.parametrize(
    ("site", "options", "says"),
    [
        ("server", [], "'server' is no name for a site here"),
        ("a b", [], "`site` is 'a b'"),
        ("site-a", ["--superlink", "fl"], "argument --superlink: 'fl'; allowed: HOST:PORT"),
        ("site-a", ["--reviewer", "none.pub"], "none.pub: cannot be read"),
        ("site-a", ["--signature", "settings.sig"], "--signature needs --reviewer, whose it is"),
    ],
)
def test_operators_slip_is_told(operator: Path, tmp_path: Path, site: str, options: list[str], says: str) -> None:
    at = ["--superlink", AT, "--root-certificates", operator / "pki" / "ca.crt", "--out", tmp_path / "x.zip", *options]
    code, said = fedspan("server", "invite", site, "--federation", operator / "federation.yaml", *at)
    assert (code, says in said) == (2, True), said
    assert not (tmp_path / "x.zip").exists()


def test_federation_file_that_names_another_model_invites_nobody(operator: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((operator / "federation.yaml").read_text())
    config["model"]["digest"] = "0" * 64
    (operator / "other.yaml").write_text(yaml.safe_dump(config))
    code, said = invite(operator, tmp_path / "x.zip", federation="other.yaml")
    assert (code, "other.yaml: the base model differs: digest" in said) == (2, True), said
