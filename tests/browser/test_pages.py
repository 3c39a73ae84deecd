"""The pages in a real browser: readable by everybody, on any screen, with nothing from elsewhere, and up to date."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from client.watch.page import SitePage
from server.report.live import LivePage
from server.report.write import write_report
from tests.browser import scenes
from tests.browser.conftest import Open, Serve
from tests.harness import sample_site

pytestmark = pytest.mark.long

FAULTS = Path(__file__).with_name("faults.js").read_text()
LOOKS: list[dict[str, Any]] = [
    {"width": width, "scheme": scheme} for width in (1280, 360) for scheme in ("light", "dark")
]
Picture = Callable[[Page, str], None]


def looks(address: str, name: str, opened: Open, picture: Picture) -> None:
    """Look at a page on a wide and a narrow screen, light and dark, closed and with all details open."""
    for look in LOOKS:
        page = opened(address, **look)
        assert page.evaluate(FAULTS) == [], look
        picture(page, f"{name}-{look['width']}-{look['scheme']}")
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate(FAULTS) == [], (look, "all details open")
        page.close()


@pytest.mark.parametrize("sites", [3, 50])
def test_run_under_way_can_be_read_by_everybody(
    tmp_path: Path, serve: Serve, opened: Open, picture: Picture, sites: int
) -> None:
    folder, _ = scenes.under_way(tmp_path / f"run-of-{sites}", sites)
    looks(serve(LivePage(folder.path)), f"run-{sites}", opened, picture)
    folder.close()


@pytest.mark.parametrize("sites", [3, 50])
def test_report_is_one_file_that_can_be_read_by_everybody(
    tmp_path: Path, opened: Open, picture: Picture, sites: int
) -> None:
    report = write_report(scenes.finished(tmp_path / f"run-of-{sites}", sites))
    looks(report.as_uri(), f"report-{sites}", opened, picture)


def test_nothing_of_a_report_is_cut_off_on_paper(tmp_path: Path, opened: Open) -> None:
    page = opened(write_report(scenes.finished(tmp_path / "run", 50)).as_uri(), width=720)  # A4 with its margins
    page.emulate_media(media="print")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    wide = page.evaluate(
        "[...document.querySelectorAll('table, figure, pre')].filter((one) => one.scrollWidth > innerWidth)"
        ".map((one) => one.textContent.trim().slice(0, 60))"
    )
    assert wide == []
    expect(page.get_by_role("navigation")).to_be_hidden()


def test_page_of_a_site_can_be_read_by_everybody(tmp_path: Path, serve: Serve, opened: Open, picture: Picture) -> None:
    site = sample_site.site_folder(tmp_path / "site", max_rounds=20, max_upload_bytes_per_day=60_000_000)
    status = site.parent / f".{sample_site.SITE}" / "status.json"
    address = serve(SitePage(site, status))
    looks(address, "site-before", opened, picture)
    sample_site.ledger(site, sample_site.agree(site), 6, refused="this site's policy: `max_rounds` is <b>6</b>")
    sample_site.status(site, rounds=6, step=12)
    looks(address, "site", opened, picture)


def test_faults_are_found_where_there_are_some(tmp_path: Path, opened: Open) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        "<main><h1>a</h1><h3>b</h3><div style='width: 2000px'>wide</div><p style='color: #999'>pale</p>"
        "<progress></progress><svg></svg><a href='#none'>c</a><table><tr><th>d<td>e<tr><td>f</table>"
        "<div style='overflow: auto; width: 50px'><p style='width: 90px'>g</p></div></main>"
    )
    found = "\n".join(opened(file.as_uri()).evaluate(FAULTS))
    for words in (
        "scrolls sideways",
        "no language",
        "no title",
        "after level 1 comes <h3> b",
        "no label",
        "a drawing without words",
        "leads nowhere",
        "a head without scope: <th> d",
        "a table without a name",
        "lines of other lengths",
        "scrolls, but not with the keyboard",
        "contrast 2.85, 4.5 needed: <p> pale",
    ):
        assert words in found


def test_keyboard_reaches_everything_and_the_focus_is_seen(tmp_path: Path, serve: Serve, opened: Open) -> None:
    folder, _ = scenes.under_way(tmp_path / "run", 50)
    page = opened(serve(LivePage(folder.path)), width=360)
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    reached: list[str] = []
    for _ in range(120):
        page.keyboard.press("Tab")
        told = page.evaluate(
            "() => { const one = document.activeElement, style = getComputedStyle(one);"
            " return [one.tagName, one.getAttribute('aria-label') || one.textContent.trim().slice(0, 40),"
            " style.outlineStyle, parseFloat(style.outlineWidth)]; }"
        )
        tag, words, style, width = told
        if tag == "BODY":
            break
        assert (style, width >= 2) == ("solid", True), f"the focus on {words} is not seen"
        reached.append(words)
    for words in (
        "Now",
        "Settings",
        "What the sites are doing",
        "Who took part in which round",
        "Every round and site",
    ):
        assert words in reached
    region = page.get_by_role("region", name="What the sites are doing")
    region.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("(one) => one.scrollLeft > 0", arg=region.element_handle())
    folder.close()


def test_page_without_javascript_says_the_same_and_loads_anew(tmp_path: Path, serve: Serve, opened: Open) -> None:
    folder, at_work = scenes.under_way(tmp_path / "run", 3)
    page = opened(serve(LivePage(folder.path)), script=False)
    loads: list[str] = []
    page.on("load", lambda _: loads.append("again"))
    expect(page.get_by_text("Round 4 of 8 is under way; 3 are done.")).to_be_visible()
    for words in (*at_work, scenes.HOSTILE, "left out after 3 rejected updates in a row"):
        expect(page.get_by_text(words).first).to_be_visible()
    scenes.finish_round(folder, 3, 4)
    expect(page.get_by_text("Between two rounds; 4 are done.")).to_be_visible(timeout=30_000)
    assert loads
    folder.close()


@pytest.mark.parametrize("sites", [3, 50])
def test_page_follows_the_run_and_leaves_the_reader_where_he_is(
    tmp_path: Path, serve: Serve, opened: Open, sites: int
) -> None:
    folder, _ = scenes.under_way(tmp_path / "run", sites)
    page = opened(serve(LivePage(folder.path)))
    page.evaluate("window.loaded = 'once'")
    details = page.locator("[data-part=costs] details")
    details.locator("summary").click()
    region = page.get_by_role("region", name="Every round and site")
    rows = region.locator("tbody tr").count()
    scrolled = region.evaluate("(one) => { one.scrollTop = 40; return one.scrollTop; }")
    assert (scrolled == 40) == (sites == 50), "the lines of three sites fit"
    details.locator("summary").focus()
    expect(page.get_by_text("Round 4 of 8 is under way; 3 are done.")).to_be_visible()
    scenes.finish_round(folder, sites, 4)
    expect(page.get_by_text("Between two rounds; 4 are done.")).to_be_visible(timeout=30_000)
    expect(region.locator("tbody tr")).to_have_count(rows + len(range(sites)) - 2, timeout=30_000)
    assert details.evaluate("(one) => one.open")
    assert region.evaluate("(one) => one.scrollTop") == scrolled
    expect(details.locator("summary")).to_be_focused()
    assert page.evaluate("window.loaded") == "once"
    folder.finish()
    folder.close()
    expect(page.locator("h1 .badge")).to_have_text("completed", timeout=30_000)
    expect(page.locator("[data-part=now]")).to_have_count(0)
    assert page.title() == "run: completed"


def test_page_says_when_its_program_has_ended(tmp_path: Path, serve: Serve, opened: Open) -> None:
    folder, _ = scenes.under_way(tmp_path / "run", 3)
    page = opened(serve(LivePage(folder.path)))
    page.route("**/parts*", lambda route: route.fulfill(status=200, body="{"))
    expect(page.get_by_role("alert")).to_contain_text("No answer since", timeout=30_000)
    page.unroute("**/parts*")
    expect(page.get_by_role("alert")).to_be_empty(timeout=30_000)
    folder.close()


def test_many_sites_cost_little_to_watch(tmp_path: Path, serve: Serve, opened: Open) -> None:
    folder, _ = scenes.under_way(tmp_path / "run", 50)
    sizes: dict[str, list[int]] = {"page": [], "parts": []}

    def weigh(response: Any) -> None:
        if response.url.startswith("http"):
            sizes["parts" if "parts?" in response.url else "page"].append(len(response.body()))

    page = opened(serve(LivePage(folder.path)), answer=weigh)
    for _ in range(60):
        page.wait_for_timeout(500)
        if len(sizes["parts"]) >= 3:
            break
    assert len(sizes["parts"]) >= 3
    assert max(sizes["page"]) < 2_000_000
    assert max(sizes["parts"][1:]) < 100_000, "only what happens now is sent again"
    folder.close()
