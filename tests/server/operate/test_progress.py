"""The display: rounds, sites, loss and time to go; live on a terminal, lines elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from common.text import clock, size
from server.operate.progress import Display, render
from server.run.events import describe
from server.run.folder import read_lines
from server.run.run_progress import RunProgress
from tests.harness.sample_run import completed


def shown(progress: RunProgress, now: float) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render(progress, now))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_every_event_of_a_run_has_its_line(tmp_path: Path) -> None:
    events = read_lines(completed(tmp_path / "run") / "events.jsonl")
    console = Console(file=io.StringIO(), width=200)
    Display(console, "run").show(events)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "fedftg: 4 rounds, training 30 tensors, 26,542,080 parameters (19.7%)" in text
    assert "site-a joined: 2210 rows, 245 held out, cpu" in text
    assert "client failed: site-c: CUDA out of memory" in text
    assert "after round 4: server held-out loss" in text
    assert text.count("\n") == sum(bool(describe(event)) for event in events)


def test_progress_shows_round_sites_loss_and_time_to_go() -> None:
    progress = RunProgress()
    progress.take({"event": "started", "rounds": 4, "time": 100.0})
    progress.take({"event": "round_started", "round": 1, "time": 110.0, "clients": ["site-a", "site-b"]})
    assert progress.eta(120.0) is None
    progress.take({"event": "reply", "client": "site-a", "loss": 2.5, "time": 140.0})
    progress.take({"event": "round_finished", "round": 1, "time": 150.0, "bytes_down": 2e6, "bytes_up": 1e3})
    progress.take({"event": "evaluated", "client": "server", "scores": {"loss": 3.25, "rouge_l": 0.5}, "time": 151.0})
    progress.take({"event": "something-new", "time": 151.0})
    assert progress.eta(150.0) == pytest.approx(120.0)
    text = shown(progress, 150.0)
    assert "round 1/4" in text
    assert "0:00:50 elapsed, 0:02:00 to go" in text
    assert "2.0 MB down, 1.0 kB up" in text
    assert ["site-a", "waiting", "2.500", "-", "-"] in [line.split() for line in text.splitlines()]
    assert ["server", "-", "3.250", "0.500"] in [line.split() for line in text.splitlines()]


def test_terminal_gets_a_live_display_and_is_left_as_it_was() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = Display(console, "run")
    display.show([{"event": "started", "rounds": 2, "time": 0.0, "strategy": "fedftg", "trained_tensors": 1,
                   "trained_parameters": 1, "model_parameters": 2}])  # fmt: skip
    display.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 0/2" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is hidden, and shown again


def test_units() -> None:
    assert [size(n) for n in (0, 999, 1e3, 318.5e6, 2.5e12)] == ["0 B", "999 B", "1.0 kB", "318.5 MB", "2.5 TB"]
    assert [clock(n) for n in (None, -1, 0, 61, 3599.6)] == ["–", "0:00:00", "0:00:00", "0:01:01", "1:00:00"]
