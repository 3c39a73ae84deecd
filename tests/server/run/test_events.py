"""The table of events: what is not in it is not written, and what is added to it is shown everywhere."""

import ast
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from server.operate.progress import Display
from server.operate.prometheus import RunCollector
from server.operate.status import show_one
from server.report.write import write_report
from server.run.events import KINDS, Kind, new_event
from server.run.folder import read_lines
from server.run.run_progress import RunProgress
from server.run.state import read_state
from tests.harness import sample_run

SERVER = Path(__file__).parents[3] / "server"
SLOW = Kind("round client reason", "client slow: {reason}", logging.WARNING, state="dawdling", problem="too slow")


def shown(what: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_new_kind_is_told_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the table it stands once; the writer's is the only other line."""
    monkeypatch.setitem(KINDS, "client_slow", SLOW)
    run = tmp_path / "run"
    folder = sample_run.begin(run)
    sample_run.play_round(folder, 1)
    with caplog.at_level(logging.WARNING):
        folder.event("client_slow", round=1, client="site-b", reason="site-b: 9 minutes for 3 steps")
    assert caplog.messages == ["client slow: site-b: 9 minutes for 3 steps"]
    console = Console(file=io.StringIO(), width=200)
    Display(console, "run").show(read_lines(run / "events.jsonl"))
    assert "client slow: site-b: 9 minutes" in console.file.getvalue()  # type: ignore[attr-defined]
    status = read_state(run)
    assert {site.site: site.doing for site in status.sites}["site-b"] == "dawdling"
    assert "too slow: site-b: 9 minutes for 3 steps" in shown(show_one(status))
    registry = CollectorRegistry()
    registry.register(RunCollector(run))
    assert 'fedspan_problems_total{kind="too slow",' in generate_latest(registry).decode()
    folder.finish()
    folder.close()
    assert '<td class="left nowrap">too slow</td>' in write_report(run).read_text()


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("client_gone", {"client": "a"}, "'client_gone' is no kind of event; allowed: started, resumed,"),
        ("client_connected", {}, "has the fields ; allowed: client"),
        ("late_reply", {"client": "a", "reason": "b", "round": 1}, "client reason round; allowed: client reason"),
    ],
)
def test_writer_refuses_what_the_table_does_not_tell(
    tmp_path: Path, kind: str, fields: dict[str, object], reason: str
) -> None:
    folder = sample_run.begin(tmp_path / "run")
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(ValueError, match=reason):
        folder.event(kind, **fields)
    folder.close()
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_kind_of_another_version_is_read_over() -> None:
    progress = RunProgress()
    progress.take({"event": "client_teleported", "time": 1.0, "client": "a"})
    assert progress.sites["a"].state == "joining"


def _written() -> Iterator[tuple[str, set[str]]]:
    """Calls of ``event("kind", field=...)`` in the server's code: the kind and the fields."""
    for file in SERVER.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "event":
                names = {keyword.arg for keyword in call.keywords if keyword.arg}
                yield from ((c.value, names) for c in ast.walk(call.args[0]) if isinstance(c, ast.Constant))


def test_every_call_of_the_writer_fits_the_table() -> None:
    calls = [(kind, fields) for kind, fields in _written() if fields]
    assert len(calls) > 12
    for kind, fields in calls:
        assert new_event(kind, dict.fromkeys(fields))["event"] == kind


def test_every_kind_is_written_and_its_words_use_its_fields() -> None:
    rounds = [*SERVER.glob("loop/*.py"), *SERVER.glob("buffered/*.py")]
    writers = [SERVER / "app.py", SERVER / "run" / "folder.py", *rounds]
    code = "".join(file.read_text() for file in writers)
    for name, kind in KINDS.items():
        assert f'"{name}"' in code
        words = kind.words if isinstance(kind.words, str) else ""
        assert {field for _, field, _, _ in Formatter().parse(words) if field} <= set(kind.fields.split())
