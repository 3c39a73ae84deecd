"""The SuperNode with a pause of one's own choice."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.supernode import _Clock

PROGRAM = Path(__file__).parents[2] / "client" / "supernode.py"


def test_flower_still_pauses_through_its_modules_time() -> None:
    from flwr.supernode import start_client_internal

    assert start_client_internal.time is time  # type: ignore[attr-defined]
    assert _Clock(0.1).monotonic is time.monotonic


def test_pause_is_cut_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for seconds in (3, 0.2):
        _Clock(0.5).sleep(seconds)
    assert slept == [0.5, 0.2]


@pytest.mark.parametrize("poll", ["0", "-1", "nan", "61"])
def test_pause_outside_its_limits_is_refused(poll: str) -> None:
    command = [sys.executable, str(PROGRAM), "--poll", poll]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "allowed: 0.05 to 60 seconds" in done.stderr
