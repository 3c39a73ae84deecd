"""What the pages are looked at with: runs of 3 and of 50 sites, under way and finished, and a site at work."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from server.run.folder import RunFolder
from tests.harness import sample_run
from tests.harness.sample_run import begin, completed, play_round

HOSTILE = "st-elsewhere <img src=x onerror=alert(1)>"
ROUNDS = 8


@contextlib.contextmanager
def of_size(sites: int) -> Iterator[list[str]]:
    """So many sites and 8 rounds in the made-up run; yields the sites' names."""
    names = [f"clinic-{number:02d}.example.org" for number in range(1, sites + 1)]
    known = {name: (500 + 37 * n, 0 if n % 7 == 3 else 40 + n, 3.0 + n % 9) for n, name in enumerate(names)}
    start = {"server": 3.91, **{name: 3.5 + 0.02 * n for n, name in enumerate(names)}}
    with mock.patch.multiple(sample_run, SITES=known, START=start, ROUNDS=ROUNDS):
        yield names


def under_way(path: Path, sites: int) -> tuple[RunFolder, list[str]]:
    """A run in its fourth round: one site is refused, one left out, one gone. Returns its folder and who trains."""
    with of_size(sites) as names:
        folder = begin(path)
        reason = f"{HOSTILE}: its base model has another digest; take the model of the invitation"
        folder.event("client_refused", client=HOSTILE, reason=reason, kind="ModelError")
        for number in (1, 2, 3):
            play_round(folder, number)
        reason = f"{names[1]}: left out after 3 rejected updates in a row"
        folder.event("client_excluded", client=names[1], reason=reason)
        folder.event("client_disconnected", client=names[2])
        at_work = [names[0], *names[3:]]
        folder.event("round_started", round=4, clients=at_work, deadline=600.0)
    return folder, at_work


def finish_round(folder: RunFolder, sites: int, number: int) -> None:
    """All sites that are at work answer, and the round ends."""
    with of_size(sites) as names:
        for name in [names[0], *names[3:]]:
            sample_run.train(folder, number, name)
        sample_run.evaluate(folder, "server", number)
    folder.event("round_finished", round=number, seconds=80.0, bytes_down=10**8, bytes_up=10**8)


def finished(path: Path, sites: int) -> Path:
    """A run that has ended well."""
    with of_size(sites):
        return completed(path)
