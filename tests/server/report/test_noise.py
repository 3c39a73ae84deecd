"""The report on noise against signal, from given norms and a given clip."""

import json
from pathlib import Path

from server.report import words
from server.report.write import write_report
from server.run.read import read_all
from tests.harness.sample_run import ROUNDS, SITES, completed

PRIVACY = {"clip": 3.0, "noise": 8.1, "delta": 1e-5, "max_epsilon": 8.0}


def declare(run: Path, *sites: str) -> None:
    """These sites add noise, and an update's norm, over two groups of layers, is 5."""
    for name in ("events", "metrics"):
        file = run / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if line.get("event") == "client_joined" and line["client"] in sites:
                line["privacy"] = PRIVACY
            if line.get("phase") == "aggregate" and line["round"] == ROUNDS:
                line["diagnostics"] = {"client-norm/a": 3.0, "client-norm/b": 4.0}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_signal_and_noise_of_the_newest_mean_are_told(tmp_path: Path) -> None:
    run = completed(tmp_path / "run")
    declare(run, *SITES)
    told = words.noise(read_all(run))
    assert told is not None
    assert f"in round {ROUNDS} an update had an L2 norm of 5 on average, of which training made at most 3" in told
    assert "The mean of 3 updates has noise of about 2.31 against a signal of at most 3." in told  # 4 / sqrt(3)
    assert told in write_report(run).read_text()


def test_nothing_is_said_where_not_every_site_adds_noise(tmp_path: Path) -> None:
    run = completed(tmp_path / "run")
    assert words.noise(read_all(run)) is None
    declare(run, "site-a")
    assert words.noise(read_all(run)) is None
