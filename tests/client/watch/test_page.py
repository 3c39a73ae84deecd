"""A site's page says what its files say, from before the first round to after the last, and when a file is damaged."""

import json
import re
import shutil
import time
from html import unescape
from pathlib import Path

import pytest

from client.watch.page import SitePage
from common.errors import ConfigError
from common.web.template import Page
from deploy.cli import main
from tests.harness import sample_site
from tests.harness.sample_site import ROUNDS, SITE, agree, ledger, site_folder

POLICY = {"max_rounds": 20, "max_upload_bytes_per_day": 60_000_000}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_folder(tmp_path_factory.mktemp("site"), **POLICY).parent


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Path:
    """The site file of a site that has agreed to nothing yet."""
    shutil.copytree(made, tmp_path / "site")
    return tmp_path / "site" / f"{SITE}.yaml"


def page_of(site: Path) -> Page:
    return SitePage(site, site.parent / f".{SITE}" / "status.json")()


def text(page: Page, part: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.parts[part])).split())


def test_site_that_has_only_its_file_is_told_what_to_do(site: Path) -> None:
    page = page_of(site)
    assert "not joined yet" in text(page, "head")
    assert "fedspan site agree" in text(page, "now")
    assert "Nothing has left this site; its ledger begins with the first request" in text(page, "left")
    assert "has agreed to no federation" in text(page, "agreed")
    assert "no model is kept here" in text(page, "model")
    agree(site)
    assert "Next: Take part: fedspan site join" in text(page_of(site), "now")


def test_round_under_way_is_told_with_its_steps_losses_limits_and_ledger(site: Path) -> None:
    agreement = agree(site)
    ledger(site, agreement, 6, refused="this site's policy: <script>no</script>")
    sample_site.status(site, rounds=6, step=5)
    page = page_of(site)
    assert page.title == f"{SITE}: connected 7/{ROUNDS}"
    now = text(page, "now")
    assert f"coding: 6 of {ROUNDS} rounds are trained here; this site trains for round 7." in now
    assert "Step 5 of 20 of this round, about 2 min 00 s to go." in now
    assert "The update of round 7 leaves, if the limits below allow it." in now
    assert "6 2.800 81.0" in text(page, "losses")
    assert "coding fedavg-lora, run 77 6 0 24.6 MB 6" in text(page, "left")
    assert "&lt;script&gt;no" in page.parts["left"]
    assert "coding: rounds in all policy.max_rounds 6 20 30 %" in text(page, "limits")
    assert "Upload today (UTC) policy.max_upload_bytes_per_day 24.6 MB 60.0 MB 41 %" in text(page, "limits")
    assert f"rounds under this agreement three times what was agreed 6 {3 * ROUNDS} 14 %" in text(page, "limits")
    assert agreement.split()[0] in text(page, "agreed")
    assert f"{ROUNDS} rounds, with at least 1 sites" in text(page, "agreed")


def test_next_step_follows_the_work(site: Path) -> None:
    agree(site)
    cases = {
        "The server asks for round 3 of 14": {"rounds": 2},
        "All rounds are trained here": {"rounds": ROUNDS},
        "once its run begins": {"name": ""},
        "The link is tried again by itself": {"link": "refused", "link_reason": "not in its register <i>"},
        "The last request was refused: not agreed": {"name": "", "work": {"refused": "not agreed", "doing": None}},
        "Devices 2 x NVIDIA L4": {"rounds": 2},
        "Take part: fedspan site join": {"time": time.time() - 60},
    }
    for told, given in cases.items():
        sample_site.status(site, **given)  # type: ignore[arg-type]
        page = page_of(site)
        assert told in text(page, "now"), told
        assert ("not in its register <i>" in text(page, "head")) == ("link" in given)
    assert "does not take part" in text(page, "head")


def test_page_follows_ledger_and_status_and_says_what_is_damaged(site: Path) -> None:
    agreement, page = agree(site), SitePage(site, site.parent / f".{SITE}" / "status.json")
    assert "Nothing has left" in text(page(), "left")
    ledger(site, agreement, 2)
    first = page()
    assert "coding fedavg-lora, run 77 2" in text(first, "left")
    ledger(site, agreement, 1)
    assert "coding fedavg-lora, run 77 3" in text(page(), "left")
    assert page().digests["agreed"] == first.digests["agreed"]
    file = site.with_name(f"{SITE}-ledger.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"rows":27', b'"rows":28', 1))
    damaged = SitePage(site, site.parent / "none")()
    assert "line 3: it was changed" in text(damaged, "left")
    assert "nothing leaves until it can" in text(damaged, "limits")
    file.write_bytes(whole[:-30])
    assert "cut off" in text(page(), "left")
    file.write_bytes(whole)
    assert "run 77 3" in text(page(), "left")
    site.with_name(f"{SITE}-agreements.json").write_text("{")
    with pytest.raises(ConfigError, match="no file that `fedspan site agree` wrote"):
        page()


def test_models_that_are_kept_are_told_with_their_digests(site: Path) -> None:
    agree(site)
    site.write_text(site.read_text() + "keep: {model: models}\n")
    folder = site.parent / "models" / "coding"
    assert f"No model is here yet. It will be in {folder} ." in text(page_of(site), "model")
    folder.mkdir(parents=True)
    for note in ({"run": "77"}, [], {"run": "77", "models": {"model": {"round": 14}}}):
        (folder / "delivered.json").write_text(json.dumps(note))
        assert "No model is here yet" in text(page_of(site), "model")
    models = {"model": {"round": 14, "trained": "aa" * 32, "files": "bb" * 32}}
    (folder / "delivered.json").write_text(json.dumps({"run": "77", "base": None, "models": models}))
    assert f"{folder / 'model'} 14 {'bb' * 32}" in text(page_of(site), "model")


def test_command_serves_it_and_names_a_file_that_is_wrong(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "watch", str(site.with_name("none.yaml"))]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
    served: list[Page] = []
    monkeypatch.setattr("client.watch.page.serve", lambda look, port, browser: served.append(look()))
    status = sample_site.status(site)
    moved = status.rename(site.with_name("elsewhere.json"))
    assert main(["site", "watch", str(site), "--status", str(moved)]) == 0
    assert "connected" in served[0].head
