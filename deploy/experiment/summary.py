"""The summary of an experiment, ``experiment.json`` in its folder, as it is read back; an earlier version's, too."""

import json
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, Field, field_validator

from common.config.load import parse
from common.config.section import Section
from common.errors import ConfigError, RunFolderError
from common.metrics import SCORES
from deploy.experiment.config import ClaimConfig

SUMMARY = "experiment.json"


class _Told(Section):
    model_config = ConfigDict(extra="ignore")


class TriedRate(_Told):
    """A learning rate that was tried; ``score`` is None when it has none, for the reason ``status``."""

    learning_rate: float
    score: float | None
    status: str = "no result"


class ToldSetting(_Told):
    """A setting with the learning rate and the round that were selected, and the folders of its final runs."""

    strategy: str
    clients: int
    alpha: float | None
    rank: int | None
    local_steps: int | None
    learning_rate: float | None
    round: int | None = None
    tried: list[TriedRate]
    cells: list[str]

    @field_validator("cells")
    @classmethod
    def _within(cls, cells: list[str]) -> list[str]:
        for cell in map(PurePosixPath, cells):
            if cell.is_absolute() or ".." in cell.parts:
                raise ValueError(f"{cell} is no folder of this experiment")
        return cells


class ToldPartition(_Told):
    """Number of rows per site and label."""

    clients: int
    alpha: float | None
    sites: dict[str, dict[str, int]]

    @property
    def labels(self) -> list[str]:
        """All labels, those with most rows first."""
        totals: dict[str, int] = {}
        for counts in self.sites.values():
            for label, count in counts.items():
                totals[label] = totals.get(label, 0) + count
        return sorted(totals, key=lambda label: (-totals[label], label))


class Summary(_Told):
    """The content; an earlier version wrote neither ``seeds`` nor ``claims``."""

    name: str
    select_by: str
    seeds: list[int] = Field([])
    claims: list[ClaimConfig] = Field([])
    settings: list[ToldSetting]
    partitions: list[ToldPartition]

    @field_validator("select_by")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SCORES:
            raise ValueError(f"{name!r} is no score")
        return name


def read_summary(out: Path) -> Summary:
    """Read the summary in an experiment's folder.

    Raises:
        RunFolderError: the folder holds no experiment, or its summary is damaged.
    """
    file = out / SUMMARY
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")), Summary, str(file))
    except FileNotFoundError:
        raise RunFolderError(f"{out} holds no experiment: there is no {SUMMARY}") from None
    except ConfigError as error:
        raise RunFolderError(f"no summary of an experiment: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from None
