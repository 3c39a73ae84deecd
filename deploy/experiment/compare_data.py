"""Results of an experiment's trials as plain data for the page: no markup, no drawing."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.metrics import SCORES, Score
from deploy.experiment.config import ClaimConfig
from deploy.experiment.summary import ToldPartition, ToldSetting, read_summary
from deploy.experiment.trial import FACTS, check_last, reading
from server.run.folder import read_lines, read_run
from server.run.records import SERVER, Record, diagnostics, evaluations

Values = dict[int, float]  # by rounds of training behind the model
#: Measurements of a round beside the scores.
BYTES, SECONDS = "bytes", "seconds"


@dataclass(frozen=True)
class Estimate:
    """Mean over the seeds, and the sample standard deviation; None when there is one seed."""

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        """Estimate from one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Seed:
    """One finished run.

    Attributes:
        versions: versions that were evaluated on the server's set.
        scores: scores on the server's set, by score and version.
        bytes: bytes of tensors sent so far, up and down, all sites together, by version.
        seconds: seconds so far if all sites worked at once, by version: in every round the slowest site's training
            plus the server's aggregation.
        diagnostics: mean over the layer groups, by name and round.
        examples: number of rows of the server's set that were scored.
        generated: number of those rows that were answered by generation.
    """

    seed: int
    versions: list[int]
    scores: dict[str, Values]
    bytes: Values
    seconds: Values
    diagnostics: dict[str, Values]
    samples: list[dict[str, str]]
    examples: int | None
    generated: int | None

    def last(self, most: float = math.inf, until: float = math.inf) -> int:
        """The last evaluated version up to ``until`` that was reached with at most ``most`` bytes."""
        reached = [v for v in self.versions if v <= until and self.bytes.get(v, math.inf) <= most]
        return max(reached, default=0)


@dataclass(frozen=True)
class Line:
    """A strategy in one setting, with all of its seeds.

    Attributes:
        rate: the selected learning rate; None: no tried rate gave a result.
        tried: number of rates tried; 0: one rate was given.
        until: the round whose state is scored, selected on the validation set; None: the last one.
        edge: whether the selected rate is the smallest or largest of several rates tried.
        unscored: rates without a score on the validation set, each with the trial's status.
        missing: number of final runs that are missing or failed.
    """

    strategy: str
    rate: float | None
    tried: int
    edge: bool
    until: int | None
    unscored: dict[float, str]
    seeds: list[Seed]
    missing: int

    def curve(self, key: str) -> dict[int, Estimate]:
        """A score by version, for the versions that all seeds have."""
        return _over_seeds([seed.scores.get(key, {}) for seed in self.seeds])

    def diagnostic(self, name: str) -> dict[int, Estimate]:
        """A diagnostic by round."""
        return _over_seeds([seed.diagnostics.get(name, {}) for seed in self.seeds])

    def cost(self, key: str) -> dict[int, float]:
        """Mean bytes or seconds so far, by version."""
        return {v: e.mean for v, e in _over_seeds([getattr(seed, key) for seed in self.seeds]).items()}

    def last(self, seed: Seed, most: float = math.inf) -> int:
        """The version of a seed's run that is scored: the last one up to ``until`` and within ``most`` bytes."""
        return seed.last(most, math.inf if self.until is None else self.until)

    @property
    def unfinished(self) -> bool:
        """Whether the selected round is the last one, so that more rounds might have been better."""
        return self.until is not None and any(self.until >= seed.last() for seed in self.seeds)

    def by_seed(self, key: str) -> dict[int, float]:
        """A score by seed, in the state that is scored."""
        scored = {seed.seed: seed.scores.get(key, {}).get(self.last(seed)) for seed in self.seeds}
        return {seed: value for seed, value in scored.items() if value is not None}

    def final(self, key: str, most: float = math.inf) -> Estimate | None:
        """A score, or what the run cost, in the state that is scored, or in the last one within ``most`` bytes."""
        values = [self._of(seed, key).get(self.last(seed, most)) for seed in self.seeds]
        known = [value for value in values if value is not None]
        return Estimate.of(known) if known and len(known) == len(values) else None

    def _of(self, seed: Seed, key: str) -> Values:
        return getattr(seed, key) if key in (BYTES, SECONDS) else seed.scores.get(key, {})


@dataclass(frozen=True)
class Group:
    """The strategies in one setting, to be compared with each other."""

    clients: int
    alpha: float | None
    rank: int | None
    local_steps: int | None
    lines: list[Line]

    @property
    def title(self) -> str:
        """The setting in words."""
        parts = [f"{self.clients} clients"]
        parts += [f"Dirichlet alpha {self.alpha:g}"] if self.alpha is not None else []
        parts += [f"rank {self.rank}"] if self.rank is not None else []
        parts += [f"{self.local_steps} local steps"] if self.local_steps is not None else []
        return ", ".join(parts)

    def scores(self) -> list[Score]:
        """The scores that were measured."""
        return [score for name, score in SCORES.items() if any(line.final(name) for line in self.lines)]

    def thriftiest(self) -> float:
        """Bytes of a whole run of the strategy that sent fewest."""
        ran = [line for line in self.lines if line.seeds]
        return min((max(seed.bytes[line.last(seed)] for seed in line.seeds) for line in ran), default=0)

    def best(self, score: Score, most: float = math.inf) -> list[str]:
        """The strategies with the best mean, to the three decimals that are shown; none when all are the same."""
        finals = {line.strategy: line.final(score.name, most) for line in self.lines}
        means = {strategy: round(final.mean, 3) for strategy, final in finals.items() if final is not None}
        if len(means) > 1 and len(set(means.values())) == 1:
            return []
        pick: Callable[[Iterable[float]], float] = min if score.lower_is_better else max
        return [strategy for strategy, mean in means.items() if mean == pick(means.values())]


@dataclass(frozen=True)
class Comparison:
    """All results in an experiment's folder."""

    name: str
    select_by: str
    claims: list[ClaimConfig]
    groups: list[Group]
    partitions: list[ToldPartition]


def read_comparison(out: Path) -> Comparison:
    """Read an experiment's folder; runs that have not ended well are counted as missing.

    Raises:
        RunFolderError: the folder holds no experiment, or a file of it cannot be read.
    """
    summary = read_summary(out)
    most = max((len(setting.cells) for setting in summary.settings), default=0)
    seeds = len(summary.seeds) or most or 1
    groups: dict[tuple[Any, ...], Group] = {}
    for setting in summary.settings:
        about = setting.model_dump(include={"clients", "alpha", "rank", "local_steps"})
        group = groups.setdefault(tuple(about.values()), Group(**about, lines=[]))
        group.lines.append(_line(out, setting, seeds))
    return Comparison(summary.name, summary.select_by, summary.claims, list(groups.values()), summary.partitions)


def _line(out: Path, setting: ToldSetting, wanted: int) -> Line:
    """The line of a setting of the summary; ``wanted`` is the number of seeds."""
    runs = [(out / cell, read_run(out / cell)) for cell in setting.cells]
    seeds = [_seed(folder, run) for folder, run in runs if run.get("status") == "completed"]
    rates = [tried.learning_rate for tried in setting.tried]
    edge = len(rates) > 1 and setting.learning_rate in (min(rates), max(rates))
    unscored = {t.learning_rate: t.status for t in setting.tried if t.score is None}
    missing = wanted - len(seeds)
    return Line(setting.strategy, setting.learning_rate, len(rates), edge, setting.round, unscored, seeds, missing)


def _seed(folder: Path, run: Mapping[str, Any]) -> Seed:
    with reading(folder):
        records = read_lines(folder / "metrics.jsonl")
        samples, cell = folder / "samples.json", json.loads((folder / FACTS).read_text(encoding="utf-8"))
        versions = evaluations(records).get(SERVER, {})
        scores = {n: {v: float(told[n]) for v, told in versions.items() if told.get(n) is not None} for n in SCORES}
        means: dict[str, Values] = {}
        for table in diagnostics(records):
            by_round = {n: [g[n] for g in table.groups.values() if g.get(n) is not None] for n in table.rounds}
            means[table.name] = {
                n: statistics.fmean(v for v in vs if v is not None) for n, vs in by_round.items() if vs
            }
        shown = json.loads(samples.read_text(encoding="utf-8")) if samples.exists() else []
        shown = [{key: str(one[key]) for key in ("prompt", "expected", "before", "after")} for one in shown]
        counts = [
            next((int(t[key]) for t in versions.values() if t.get(key)), None) for key in ("examples", "generated")
        ]
        moved, spent = _costs(records)
        check_last(versions.keys() & moved.keys(), {"last_round": max(versions, default=0), **run})
        scores = {key: values for key, values in scores.items() if values}
        return Seed(int(cell["seed"]), [*versions], scores, moved, spent, means, shown, *counts)


def _costs(records: list[Record]) -> tuple[Values, Values]:
    """Bytes and seconds so far, by version."""
    moved: Values = {0: 0.0}
    spent: Values = {0: 0.0}
    trained = [record for record in records if record["phase"] == "train"]
    for number in sorted({record["round"] for record in trained}):
        those = [record for record in trained if record["round"] == number]
        combining = [r["seconds"]["aggregate"] for r in records if r["phase"] == "aggregate" and r["round"] == number]
        moved[number] = moved[max(moved)] + sum(r["bytes"]["down"] + r["bytes"]["up"] for r in those)
        slowest = max(record["seconds"].get("train", 0.0) for record in those)
        spent[number] = spent[max(spent)] + slowest + sum(combining)
    return moved, spent


def _over_seeds(values: list[Values]) -> dict[int, Estimate]:
    common = set.intersection(*map(set, values)) if values else set()
    return {version: Estimate.of([seed[version] for seed in values]) for version in sorted(common)}
