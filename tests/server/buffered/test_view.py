"""What the operator sees of rounds that wait for no slow site: status, watch, report, Prometheus."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from server.operate.progress import render
from server.operate.prometheus import RunCollector
from server.operate.status import show_one
from server.report.live import LivePage
from server.report.write import render as report
from server.run.read import read_all
from server.run.run_progress import RunProgress
from server.run.state import read_state, state_of
from tests.harness.fake_sites import Clock, Ordered, Site, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Site 3 is slow: its first update counts in round 3, its second one is dropped in round 7."""
    Clock(monkeypatch)
    sites = {number: Site(number) for number in (1, 2, 3)}
    order = [1, 2, 1, 2, 3, 1, 2, 1, 2, 1, 2, 1, 3, 2, 1]
    cohort = {"min_clients": 2, "mode": "buffered", "size": 2, "max_age": 2}
    run(tmp_path, list(sites.values()), 7, grid=Ordered(sites, order), cohort=cohort)
    return tmp_path / "run"


def test_status_and_prometheus_tell_ages_and_whose_work_is_of_which_round(folder: Path) -> None:
    found = read_state(folder)
    assert found.ages == {0: 12, 1: 1, 2: 1}
    assert [(line.round, line.sites, line.asked) for line in found.finished_rounds[:3]] == [
        (1, 2, 3),
        (2, 2, 2),
        (3, 2, 3),
    ]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(show_one(found))
    assert "updates: 12 of age 0, 1 of age 1, 1 of age 2" in shown.get()
    assert "too old" in shown.get()
    registry = CollectorRegistry()
    registry.register(RunCollector(folder))
    told = generate_latest(registry).decode()
    assert 'fedspan_updates_total{age="2",run="run",strategy="fedftg"} 1.0' in told


def test_run_under_way_shows_since_which_round_a_site_trains(folder: Path) -> None:
    whole = read_all(folder)
    begun = next(i for i, e in enumerate(whole.events) if e["event"] == "round_started" and e["round"] == 3)
    progress = RunProgress()
    for event in whole.events[: begun + 1]:
        progress.take(event)
    assert {name: (site.state, site.round) for name, site in progress.sites.items() if name != "server"} == {
        "site-1": ("training", 3),
        "site-2": ("training", 3),
        "site-3": ("training", 1),
    }
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(progress, whole.events[begun]["time"]))
    assert shown.get().count("training since round 1") == 1


def test_report_has_the_ages_and_who_was_busy(folder: Path) -> None:
    html = report(read_all(folder))
    assert "Updates by age" in html
    row = html[html.index("Dropped, too old") :]
    cells = row[row.index("site-3") : row.index("site-3") + 200]
    assert cells.split("</tr>")[0].count("<td>0</td>") == 2
    assert 'aria-label="still training">·' in html
    assert "site-3: 3 rounds were finished since it started" in html
    LivePage(folder)()
    outcomes = {site.site: site.rounds for site in state_of(read_all(folder)).sites}
    assert outcomes["site-3"] == 1
