"""``fedspan site agree``: what it shows, what it pins, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from client.privacy.agreement import read_agreements
from common.accountant import cost, epsilon
from common.system.keys import make_site
from deploy.cli import main
from deploy.sandbox.tiny import make_federation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_federation(tmp_path, {"site-a": 9})
    return tmp_path


def change(file: Path, **keys: object) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **keys}))


def agree(folder: Path, *more: str) -> int:
    return main(["site", "agree", str(folder / "federation.yaml"), "--site", str(folder / "site-a.yaml"), *more])


def test_it_shows_what_is_asked_and_pins_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agree(folder, "--yes") == 0
    told = capsys.readouterr().out
    assert "FedFTG (arXiv 2410.23111)" in told
    assert "3 steps of 4 rows, up to 64 tokens each" in told
    assert "2 rounds, with at least 1 sites" in told
    assert "mean training loss" in told
    assert "learning_rate: 0.01" in told
    (agreement,) = read_agreements(folder / "site-a-agreements.json").values()
    assert f"settings {agreement.digest}" in told
    assert agreement.model.path == str(folder / "model")
    assert (folder / "site-a-agreements.json").stat().st_mode & 0o777 == 0o600


def test_with_privacy_no_loss_is_announced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    privacy = {"clip": 0.5, "noise_multiplier": 8.0, "delta": 1e-5, "max_epsilon": 8.0}
    change(folder / "site-a.yaml", privacy=privacy)
    assert agree(folder, "--yes") == 0
    told = capsys.readouterr().out
    assert "clipped to norm 0.5 and noised" in told
    assert "loss;" not in told


def test_nobody_to_ask_agrees_to_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert agree(folder) == 2
    assert "give --yes" in capsys.readouterr().err
    assert not (folder / "site-a-agreements.json").exists()


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 1), ("n", 1), ("yes", 0)])
def test_whoever_sits_there_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert agree(folder) == code
    assert (folder / "site-a-agreements.json").exists() == (code == 0)


def test_agreements_are_listed_replaced_and_taken_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agree(folder, "--yes")
    first = read_agreements(folder / "site-a-agreements.json")["tiny"].digest
    change(folder / "federation.yaml", rounds=5)
    agree(folder, "--yes")
    (second,) = read_agreements(folder / "site-a-agreements.json").values()
    assert second.digest != first
    capsys.readouterr()
    site = ["--site", str(folder / "site-a.yaml")]
    assert main(["site", "agree", *site]) == 0
    assert capsys.readouterr().out.startswith(f"tiny: settings {second.digest}, agreed ")
    assert main(["site", "agree", *site, "--withdraw", "tinny"]) == 2
    assert "agreed: tiny" in capsys.readouterr().err
    assert main(["site", "agree", *site, "--withdraw", "tiny"]) == 0
    assert read_agreements(folder / "site-a-agreements.json") == {}


def test_folder_that_only_the_operator_has_is_no_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "federation.yaml", model={"path": "/operators/model"})
    assert agree(folder, "--yes") == 2
    assert "write in" in (said := capsys.readouterr().err)
    assert "`model: FOLDER`" in said
    change(folder / "site-a.yaml", model="model")
    assert agree(folder, "--yes") == 0


def test_digest_is_that_of_the_settings_wherever_the_files_are(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agree(folder, "--yes")
    other = tmp_path_factory.mktemp("elsewhere")
    make_federation(other, {"site-a": 20}, cohort={"round_deadline": 7.0}, local=None)
    agree(other, "--yes")
    digests = {read_agreements(f / "site-a-agreements.json")["tiny"].digest for f in (folder, other)}
    assert len(digests) == 1


class TestReviewer:
    """With `trust.settings` a site agrees to nothing that no reviewer has signed."""

    @pytest.fixture
    def signed(self, folder: Path) -> Path:
        for name in ("reviewer", "stranger"):
            assert main(["code", "key", str(folder / name)]) == 0
            sign = ["code", "sign", "--key", str(folder / f"{name}.key"), "--out", str(folder / f"{name}.sig")]
            assert main([*sign, "--federation", str(folder / "federation.yaml")]) == 0
        change(folder / "site-a.yaml", trust={"keys": ["reviewer.pub"], "settings": True})
        return folder

    def test_signature_is_asked_for(self, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert agree(signed, "--yes") == 1
        assert "give --signature FILE" in capsys.readouterr().err

    def test_trusted_signature_is_enough(self, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert agree(signed, "--yes", "--signature", str(signed / "reviewer.sig")) == 0
        (agreement,) = read_agreements(signed / "site-a-agreements.json").values()
        assert agreement.reviewer == json.loads((signed / "reviewer.sig").read_text())["key"]
        assert f"reviewed by    {agreement.reviewer}" in capsys.readouterr().out

    def test_others_are_not(self, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert agree(signed, "--yes", "--signature", str(signed / "stranger.sig")) == 1
        assert "not a signature of settings" in capsys.readouterr().err
        change(signed / "federation.yaml", rounds=3)
        assert agree(signed, "--yes", "--signature", str(signed / "reviewer.sig")) == 1

    def test_signature_of_code_is_none_of_settings(self, signed: Path) -> None:
        sign = ["code", "sign", "--key", str(signed / "reviewer.key"), "--out", str(signed / "bundle.sig")]
        assert main(sign) == 0
        assert agree(signed, "--yes", "--signature", str(signed / "bundle.sig")) == 1


def test_sums_are_made_with_named_peers_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "federation.yaml", secure_aggregation={"threshold": 2}, cohort={"min_clients": 3})
    change(folder / "federation.yaml", strategy={"name": "fedit"})
    assert agree(folder, "--yes") == 2
    assert "give --peer FILE.pub for each, 1 at least; 0 known" in capsys.readouterr().err
    known = {name: make_site(folder / name) for name in ("site-b", "site-c")}
    peers = [word for name in known for word in ("--peer", str(folder / f"{name}.pub"))]
    assert agree(folder, "--yes", *peers, "--least-peers", "3") == 2
    assert "--least-peers is 3; 2 peers known; give --peer FILE.pub for each" in capsys.readouterr().err
    assert agree(folder, "--yes", *peers, "--least-peers", "2") == 0
    told = capsys.readouterr().out
    assert "only the sum of its update and those of at least 2 of these sites" in told
    assert all(f"{name}, key {key}" in told for name, key in known.items())
    (agreement,) = read_agreements(folder / "site-a-agreements.json").values()
    assert (agreement.peers, agreement.least_peers) == (known, 2)
    change(folder / "federation.yaml", rounds=7)
    assert agree(folder, "--yes") == 0  # other settings, the same peers
    (agreement,) = read_agreements(folder / "site-a-agreements.json").values()
    assert (agreement.peers, agreement.least_peers) == (known, 2)
    assert main(["site", "join", str(folder / "site-a.yaml"), "--superlink", "127.0.0.1:1", "--insecure"]) == 2
    assert "`secure_aggregation` of tiny signs with the site's key; give --auth-supernode" in capsys.readouterr().err
    change(folder / "federation.yaml", secure_aggregation=None)
    assert agree(folder, "--yes", *peers) == 2
    assert "which this federation does not have" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "line"), [(0.2, "protects"), (0.1, "refused")])
def test_shared_noise_is_told_with_both_epsilons(
    folder: Path, capsys: pytest.CaptureFixture[str], part: float, line: str
) -> None:
    privacy = {"clip": 0.1, "noise_multiplier": 2.5, "delta": 1e-5, "max_epsilon": 99.0, "noise": "shared"}
    change(folder / "site-a.yaml", privacy=privacy)
    secure = {"threshold": 2, "noise": part}
    change(folder / "federation.yaml", strategy="fedit", cohort={"min_clients": 2}, secure_aggregation=secure)
    make_site(folder / "b")
    assert agree(folder, "--yes", "--peer", str(folder / "b.pub")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"adds noise of standard deviation {part:g} to every number, as all these sites do" in told
    of, worst = (epsilon(2 * cost(part * parts**0.5 / 0.1), 1e-5) for parts in (2, 1))
    both = f"protects against the server with epsilon {of:.3g} in all rounds, delta 1e-05; if all other sites told the "
    assert (f"{both}server their noise, with epsilon {worst:.3g}" in told) == (line == "protects")
    assert ("refused this site's privacy: `noise_multiplier` is 2.5; 2 honest sites" in told) == (line == "refused")
