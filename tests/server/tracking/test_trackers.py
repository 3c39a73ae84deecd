"""Trackers beside TensorBoard: they get every number, and nothing that happens to them happens to the run."""

import importlib.machinery
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config.federation import resolved, settings_for_sites
from common.errors import ConfigError
from deploy.local import make_plan
from deploy.sandbox.tiny import make_federation
from server.run.folder import RunFolder, read_run
from server.tracking import trackers
from server.tracking.sink import Tracked
from tests.harness import sample_run
from tests.harness.results import events, lines

BOTH = {"mlflow": {"uri": "sqlite:////nowhere/x.db"}, "wandb": {"mode": "offline"}}


class Fake:
    """A tracker that keeps what it is given."""

    def __init__(self, config: Any, run: Tracked) -> None:
        del config
        self.run, self.told, self.status = run, list[tuple[dict[str, float], int]](), ""
        FAKES.append(self)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.told.append((dict(numbers), step))

    def end(self, status: str) -> None:
        self.status = status


FAKES: list[Fake] = []


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    FAKES.clear()
    spec = importlib.machinery.ModuleSpec("x", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(trackers, "MLflow", Fake)
    monkeypatch.setattr(trackers, "Wandb", Fake)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, as they are named for trackers."""
    parts = {part: values for part, values in record.items() if isinstance(values, dict)}
    named = {
        f"{part}/{key}/{record['client']}": value for part, values in parts.items() for key, value in values.items()
    }
    return {name: float(value) for name, value in named.items() if value is not None}


def test_every_tracker_gets_every_number_that_is_finite(tmp_path: Path) -> None:
    folder = sample_run.begin(tmp_path / "run", tracking=BOTH)
    for number in (1, 2):
        sample_run.play_round(folder, number)
    folder.metrics({"round": 2, "client": "site-a", "phase": "evaluate", "evaluate": {"loss": float("inf"), "x": None}})
    folder.finish()
    folder.close()
    wanted = [(numbers(record), record["round"]) for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(FAKES) == 2
    for fake in FAKES:
        assert fake.told == [one for one in wanted if one[0]]
        assert fake.status == "completed"
        assert (fake.run.name, fake.run.federation, fake.run.folder) == ("run", "sample", tmp_path / "run")
        assert fake.run.settings["strategy.name"] == "fedftg"
        assert not any("path" in key or key.startswith("local.") for key in fake.run.settings)
    assert events(tmp_path / "run", "tracker_failed") == []


@pytest.mark.parametrize("end", ["failed", "interrupted", None])
def test_trackers_know_how_the_run_ended(tmp_path: Path, end: str | None) -> None:
    folder = sample_run.begin(tmp_path / "run", tracking=BOTH)
    if end == "failed":
        folder.fail("too few sites", "FederationError")
    elif end == "interrupted":
        folder.interrupt()
    folder.close()
    assert [fake.status for fake in FAKES] == [end or "interrupted"] * 2


def broken(where: str) -> Callable[..., Fake]:
    """A kind of tracker that raises, or hangs, at one of its calls."""

    def act(*_: object) -> None:
        if where.startswith("hangs"):
            threading.Event().wait()
        raise SystemExit("no\x1b[2J luck") if where == "log" else RuntimeError("no\x1b[2J luck")

    class Broken(Fake):
        if where.endswith("make"):
            __init__ = act  # type: ignore[assignment]
        elif where.endswith("log"):
            log = act
        else:
            end = act

    return Broken


@pytest.mark.parametrize("where", ["make", "log", "end", "hangs in make", "hangs in log", "hangs in end"])
def test_tracker_that_fails_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(trackers, "Wandb", broken(where))
    monkeypatch.setattr(trackers, "_PATIENCE", 0.3)
    folder = sample_run.begin(tmp_path / "run", tracking=BOTH)
    started = time.monotonic()
    for number in (1, 2):
        sample_run.play_round(folder, number)
    folder.finish()
    folder.close()
    assert time.monotonic() - started < 30  # a hang would be for ever
    (failed,) = events(tmp_path / "run", "tracker_failed")
    reason = "it has not taken all numbers in time" if "hangs" in where else "no\\x1b[2J luck"
    assert failed["reason"].startswith("W&B gets no more numbers: ")
    assert failed["reason"].endswith(reason)
    assert read_run(tmp_path / "run")["status"] == "completed"
    (mlflow,) = [fake for fake in FAKES if type(fake) is Fake]
    assert (mlflow.status, len(mlflow.told)) == ("completed", 16)


def test_resumed_run_goes_on_in_the_same_run_of_the_tracker(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = sample_run.begin(run, tracking=BOTH)
    folder.close()
    other = {"wandb": {"project": "elsewhere"}}
    federation = resolved(sample_run.federation(tracking=other), tmp_path / "federation.yaml")
    RunFolder.reopen(run, federation).close()
    first, _, again = FAKES
    assert first.run.id == again.run.id
    assert read_run(run)["id"] == first.run.id
    folder = sample_run.begin(tmp_path / "other", tracking=BOTH)
    folder.close()
    assert FAKES[-1].run.id != first.run.id


def test_sites_are_not_told_of_trackers() -> None:
    with_, without = (sample_run.federation(**more) for more in ({"tracking": BOTH}, {}))
    assert settings_for_sites(with_) == settings_for_sites(without)


@pytest.mark.parametrize(
    ("mlflow", "told"),
    [
        ({"uri": "https://me:secret@ml.example.org"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"uri": "postgresql://me:secret@db/x"}, "holds a password"),
        ({"uri": "mlruns"}, "is no address"),
        ({"uri": "sqlite:///mlflow.db"}, "is no address"),
        ({"url": "https://ml.example.org"}, "did you mean `uri`"),
        ({"experiment": ""}, "at least 1 character"),
    ],
)
def test_section_is_checked(mlflow: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        sample_run.federation(tracking={"mlflow": mlflow})
    assert "secret" not in str(raised.value)


def test_address_with_a_user_alone_is_no_secret() -> None:
    uri = "https://me@ml.example.org:8443/x"
    assert sample_run.federation(tracking={"mlflow": {"uri": uri}}).tracking.mlflow.uri == uri  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_missing_package_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = make_federation(tmp_path, {"site-a": 2}, cohort={"min_clients": 1}, tracking=BOTH)
    make_plan(file, tmp_path / "runs", None)
    spec = importlib.machinery.ModuleSpec("x", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda one: None if one == name else spec)
    with pytest.raises(ConfigError, match=rf"`tracking\.{name}` needs .* pip install 'fedspan\[{name}\]'"):
        make_plan(file, tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists()


def test_mlflow_must_be_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    federation = sample_run.federation(tracking={"mlflow": {}})
    with pytest.raises(ConfigError, match=r"tracking\.mlflow\.uri"):
        trackers.check_trackers(federation)
    trackers.check_trackers(federation, environment=False)  # a standing server has an environment of its own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ml.example.org")
    trackers.check_trackers(federation)


def test_no_number_waits_for_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class Slow(Fake):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            gate.wait()
            super().log(numbers, step)

    monkeypatch.setattr(trackers, "Wandb", Slow)
    folder = sample_run.begin(tmp_path / "run", tracking={"wandb": {}})
    sample_run.play_round(folder, 1)  # would not return
    assert FAKES[0].told == []
    gate.set()
    folder.finish()
    folder.close()
    assert len(FAKES[0].told) == 8
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "completed"
