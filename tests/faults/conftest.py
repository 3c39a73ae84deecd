"""What was injected, how often, and how it ended: a table at the end of the session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.in_one_process import expected

QUIET = {"every": 100, "max_examples": 1, "samples": 0}
SIZES = {"site-a": 9, "site-b": 17}
Note = Callable[..., None]


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Note:
    """Note that a fault was injected ``times`` times, and how the federation is to end."""

    def note(fault: str, times: int = 1, ends: str = "the result is as without it") -> None:
        request.node.user_properties.append(("fault", (fault, times, ends)))

    return note


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run folder of a federation to which nothing happens."""

    def run(strategy: object, rounds: int) -> Path:
        folder = tmp_path_factory.mktemp("straight") / "federation"
        return expected(folder, SIZES, strategy=strategy, rounds=rounds, evaluation=QUIET)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[tuple[str, str, str], int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []) if report.when == "call" else []:
                if name == "fault":
                    fault, times, ends = value
                    key = (fault, ends, outcome)
                    rows[key] = rows.get(key, 0) + times
    if not rows:
        return
    terminalreporter.section("injected faults")
    width = max(len(fault) for fault, _, _ in rows)
    for (fault, ends, outcome), times in sorted(rows.items()):
        terminalreporter.write_line(f"{fault:{width}}  {times:4} x  {ends if outcome == 'passed' else 'FAILED'}")
    terminalreporter.write_line(f"{'all':{width}}  {sum(rows.values()):4} x")
