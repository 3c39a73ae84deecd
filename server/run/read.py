"""The content of a run's folder, read at once for status and report; nothing is written."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from common.config.strategy import title_of
from common.errors import RunFolderError
from server.run import records
from server.run.folder import FEDERATION, read_lines, read_run


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; all of it may be empty, as the run has just begun.

    Attributes:
        path: the folder.
        info: run.json.
        security: security.json, one entry whenever code or link was another.
        owners: nodes.json.
        settings: the text of federation.yaml.
    """

    path: Path
    info: dict[str, Any]
    events: list[records.Record]
    metrics: list[records.Record]
    samples: list[dict[str, str]]
    security: list[dict[str, Any]]
    owners: dict[str, dict[str, Any]]
    signatures: list[dict[str, str]]
    settings: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The federation file's content; empty when there is none.

        Raises:
            RunFolderError: it is no YAML.
        """
        try:
            return dict(yaml.safe_load(self.settings) or {})
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise RunFolderError(f"{self.path / FEDERATION} cannot be read: {error}") from None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.resolve().name

    @property
    def planned(self) -> int:
        """Number of rounds that the federation file asks for."""
        return int(self.event("started").get("rounds") or self.config.get("rounds", 0))

    @property
    def strategy(self) -> str:
        """The strategy as people write it."""
        return title_of(str(self.config.get("strategy", {}).get("name", "–")))

    @property
    def buffered(self) -> bool:
        """Whether slow sites go on while the others begin the next round."""
        return (self.config.get("cohort") or {}).get("mode") == "buffered"

    @property
    def done(self) -> int:
        """Number of finished rounds."""
        return max((event["round"] for event in self.events if event["event"] == "round_finished"), default=0)

    @property
    def newest(self) -> float:
        """Unix time of the last event, or of the start; 0 before."""
        return float(self.events[-1]["time"] if self.events else self.info.get("started", 0.0))

    def event(self, kind: str) -> records.Record:
        """The last event of a kind; empty when there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})


def read_all(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises:
        RunFolderError: a file of it cannot be read; names it.
    """
    try:
        return Run(
            path=run_dir,
            info=read_run(run_dir),
            events=read_lines(run_dir / "events.jsonl"),
            metrics=read_lines(run_dir / "metrics.jsonl"),
            samples=_json(run_dir / "samples.json", []),
            security=_json(run_dir / "security.json", []),
            owners=_json(run_dir / "nodes.json", {}),
            signatures=_json(run_dir / "signatures.json", []),
            settings=_text(run_dir / FEDERATION) or "",
        )
    except OSError as error:
        raise RunFolderError(f"{error.filename} cannot be read: {error.strerror}") from None


def _json(file: Path, instead: Any) -> Any:  # noqa: ANN401 - any JSON value
    text = _text(file)
    try:
        return instead if text is None else json.loads(text)
    except ValueError:
        raise RunFolderError(f"{file}: not valid JSON") from None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunFolderError(f"{file}: not valid UTF-8") from None
