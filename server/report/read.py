"""A run folder, read for its report."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from common.config.strategy import title_of
from common.errors import RunFolderError
from server.run import records
from server.run.folder import read_lines


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    info: dict[str, Any]
    events: list[records.Record]
    metrics: list[records.Record]
    samples: list[dict[str, str]]
    settings: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The federation file's content; empty when there is none."""
        return dict(yaml.safe_load(self.settings) or {})

    @property
    def planned(self) -> object:
        """Number of rounds that the federation file asks for."""
        return self.event("started").get("rounds") or self.config.get("rounds", "–")

    @property
    def strategy(self) -> str:
        """The strategy as people write it."""
        return title_of(str(self.config.get("strategy", {}).get("name", "–")))

    @property
    def done(self) -> int:
        """Number of finished rounds."""
        return max((event["round"] for event in self.events if event["event"] == "round_finished"), default=0)

    @property
    def newest(self) -> float:
        """Unix time of the last event, or of the start."""
        return float(self.events[-1]["time"] if self.events else self.info["started"])

    def event(self, kind: str) -> records.Record:
        """The last event of a kind; empty when there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        RunFolderError: the folder holds no run, or a file of it cannot be read.
    """
    if not (run_dir / "run.json").is_file():
        raise RunFolderError(f"{run_dir} is no run folder: it holds no run.json")
    try:
        samples = run_dir / "samples.json"
        settings = run_dir / "federation.yaml"
        return Run(
            info=_json(run_dir / "run.json"),
            events=read_lines(run_dir / "events.jsonl"),
            metrics=read_lines(run_dir / "metrics.jsonl"),
            samples=_json(samples) if samples.exists() else [],
            settings=settings.read_text(encoding="utf-8") if settings.exists() else "",
        )
    except OSError as error:
        raise RunFolderError(f"{error.filename} cannot be read: {error.strerror}") from None


def _json(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        raise RunFolderError(f"{file}: not valid JSON") from None
