"""The page of a run that goes on says what every site is doing, and why one is not taking part."""

import re
import time
from html import unescape
from pathlib import Path

import pytest

from common.web.template import Page
from server.report import live
from server.report.live import LivePage
from server.run import read
from tests.harness.sample_run import SITES, begin, evaluate, play_round, train


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "figures", lambda run: {})
    monkeypatch.setattr(live, "_REST", 0)


def line_of(page: Page, site: str) -> str:
    """The words of a site's line in the table of what goes on now."""
    section = page.sections[0]
    assert section.id == "now"
    (line,) = [row for row in section.html.split("<tr>") if f'<th scope="row">{site}</th>' in row]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", line)).split())


def test_every_site_is_told_with_what_it_does_and_why_not(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    folder.event("client_refused", client="evil", reason="<b>evil</b>: other base model", kind="ModelError")
    play_round(folder, 1)
    folder.event("client_excluded", client="site-b", reason="site-b: 3 rejected updates in a row")
    folder.event("client_disconnected", client="site-c")
    folder.event("round_started", round=2, clients=["site-a"], deadline=60.0)
    page = LivePage(folder.path)()
    assert "training" in line_of(page, "site-a")
    assert "left out" in line_of(page, "site-b")
    assert "site-b: 3 rejected updates in a row" in line_of(page, "site-b")
    assert "not connected" in line_of(page, "site-c")
    assert "<b>evil</b>: other base model" in line_of(page, "evil")
    now = page.sections[0].html
    assert "&lt;b&gt;evil&lt;/b&gt;" in now
    assert "Round 2 of 4 is under way; 1 is done." in now
    order = re.findall(r'<th scope="row">([^<]*)</th>', now)
    assert set(order[:3]) == {"evil", "site-b", "site-c"}, "those in trouble come first"
    folder.close()


def test_how_far_a_site_is_follows_from_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path / "run")
    folder.event("round_started", round=1, clients=list(SITES), deadline=60.0)
    began = time.time()
    clock = [began + 5.0]
    monkeypatch.setattr(live.time, "time", lambda: clock[0])
    page = LivePage(folder.path)
    assert "its first round" in line_of(page(), "site-a")
    monkeypatch.undo()
    monkeypatch.setattr(live, "figures", lambda run: {})
    monkeypatch.setattr(live, "_REST", 0)
    for site in SITES:
        train(folder, 1, site)  # site-a takes 78 seconds by its reply
    assert "waiting" in line_of(page(), "site-a")
    folder.event("round_finished", round=1, seconds=80.0, bytes_down=1, bytes_up=1)
    folder.event("round_started", round=2, clients=list(SITES), deadline=60.0)
    usual = sum({"download": 2.5, "load": 6.0, "train": 44.0, "evaluate": 22.0, "upload": 3.0, "wait": 0.5}.values())
    monkeypatch.setattr(live.time, "time", lambda: clock[0])
    clock[0] = began + usual / 2
    assert re.search(r"about (49|50|51)% of 1 min 18 s", line_of(page(), "site-a"))
    clock[0] = began + 3 * usual
    assert "longer than the last time (1 min 18 s)" in line_of(page(), "site-a")
    folder.close()


def test_page_follows_the_folder_and_reads_it_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reads = begin(tmp_path / "run"), []
    real = read.read_all
    monkeypatch.setattr(live, "read_all", lambda path: (reads.append(path), real(path))[1])
    page = LivePage(folder.path)
    first = page()
    assert page().digests["result"] == first.digests["result"]
    assert len(reads) == 1
    play_round(folder, 1)
    evaluate(folder, "server", 1)
    then = page()
    assert len(reads) == 2
    changed = {name for name in first.digests if first.digests[name] != then.digests[name]}
    assert {"now", "result", "costs", "sites"} <= changed
    assert "settings" not in changed
    folder.finish()
    folder.close()
    assert page().sections[0].id == "result"
    assert page().title == "run: completed"


def test_figures_are_drawn_again_only_after_a_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, drawn = begin(tmp_path / "run"), []
    monkeypatch.setattr(live, "figures", lambda run: drawn.append(len(run.metrics)) or {})
    monkeypatch.setattr(live, "_DRAWING_REST", 1e9)
    page = LivePage(folder.path)
    play_round(folder, 1)
    page()
    play_round(folder, 2)
    page()
    assert len(drawn) == 1, "the drawing is old, the tables are not"
    assert "Round 2" not in page().title
    monkeypatch.setattr(page, "_draw_after", 0.0)
    page()
    assert len(drawn) == 2
    play_round(folder, 3)
    folder.finish()
    page()
    assert len(drawn) == 3, "the end is drawn at once"
    folder.close()


def test_run_whose_server_is_only_starting_has_a_page(tmp_path: Path) -> None:
    from server.run.supervisor_lock import supervising

    with supervising(tmp_path / "run"):
        page = LivePage(tmp_path / "run")()
        assert page.title.startswith("run: starting")
        assert "The server is starting." in page.sections[0].html


def test_delivery_is_told_as_it_goes(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    play_round(folder, 1)
    folder.event("delivering", clients=["site-a", "site-b"], deadline=60)
    folder.event("model_delivered", client="site-a", round=1, same=True)
    page = LivePage(folder.path)()
    assert "The rounds are over; the model goes to the sites." in page.sections[0].html
    assert "has the model" in line_of(page, "site-a")
    assert "gets the model" in line_of(page, "site-b")
    folder.close()


def test_large_run_is_read_again_only_after_a_rest_but_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_REST", 1e9)
    folder = begin(tmp_path / "run")
    page = LivePage(folder.path)
    page()
    play_round(folder, 1)
    assert "No round has begun." in page().sections[0].html
    folder.finish()
    folder.close()
    assert page().title == "run: completed"
