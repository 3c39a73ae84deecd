"""Tests of an experiment's claims: is a strategy better than another, over the same seeds in the same setting?"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from common.config.strategy import title_of
from common.metrics import SCORES, Score
from common.web.format import precise, score
from deploy.experiment.compare_data import Comparison, Line

_LEVEL, _POWER = 0.05, 0.8
_MOST = 1000  # a larger number of needed seeds is not told


@dataclass(frozen=True)
class Paired:
    """Two strategies over the seeds that both have run; a positive difference is in favor of the first.

    Attributes:
        seeds: number of pairs.
        difference: mean of the differences.
        deviation: sample standard deviation of the differences; None with fewer than two pairs.
        p: two-sided p-value of the paired t-test; None with fewer than two pairs.
    """

    seeds: int
    difference: float
    deviation: float | None
    p: float | None

    @classmethod
    def of(cls, first: dict[int, float], second: dict[int, float], *, lower_is_better: bool) -> "Paired | None":
        """Compare two strategies' scores by seed; None when no seed has both."""
        from scipy import stats

        both = sorted(first.keys() & second.keys())
        if not both:
            return None
        found = [(first[seed] - second[seed]) * (-1 if lower_is_better else 1) for seed in both]
        mean = statistics.fmean(found)
        if len(found) < 2:
            return cls(1, mean, None, None)
        deviation = statistics.stdev(found)
        if deviation == 0:
            return cls(len(found), mean, 0.0, 1.0 if mean == 0 else 0.0)
        t = abs(mean) / (deviation / math.sqrt(len(found)))
        return cls(len(found), mean, deviation, float(2 * stats.t.sf(t, len(found) - 1)))

    @property
    def verdict(self) -> str:
        """Better, worse, or not decided."""
        if self.p is None or self.p >= _LEVEL:
            return "not decided"
        return "better" if self.difference > 0 else "worse"

    def needed(self) -> int | None:
        """Number of seeds that would decide a difference of this size; None: decided, unknown, or too many to tell."""
        from scipy import stats

        if self.verdict != "not decided" or not self.deviation or not self.difference:
            return None
        effect = abs(self.difference) / self.deviation
        for seeds in range(max(self.seeds, 3), _MOST + 1):
            free = seeds - 1
            if stats.nct.sf(stats.t.isf(_LEVEL / 2, free), free, effect * math.sqrt(seeds)) >= _POWER:
                return seeds
        return None


def claims(found: Comparison) -> Iterator[tuple[str, list[str], list[list[tuple[str, bool]]]]]:
    """One table per claim: title, heads, and rows of texts, each with whether it decides; empty without claims."""
    how = SCORES[found.select_by]
    for claim in found.claims:
        rows: list[list[tuple[str, bool]]] = []
        for group in found.groups:
            lines = {line.strategy: line for line in group.lines}
            pairs = [(lines.get(claim["better"]), lines.get(other)) for other in claim["than"]]
            rows += [_row(group.title, first, second, how) for first, second in pairs if first and second]
        heads = ["Setting", "Compared with", f"Gain in {how.in_text}", "Seeds", "p", "Verdict", "Seeds needed"]
        yield f"{title_of(claim['better'])} is better", heads, rows


def _row(setting: str, first: Line, second: Line, how: Score) -> list[tuple[str, bool]]:
    paired = Paired.of(first.by_seed(how.name), second.by_seed(how.name), lower_is_better=how.lower_is_better)
    other = title_of(second.strategy)
    if paired is None:
        return [(text, False) for text in (setting, other, "–", "0", "–", "not run", "–")]
    gain = (
        score(paired.difference)
        if paired.deviation is None
        else (f"{score(paired.difference)} ± {precise(paired.deviation)}")
    )
    verdict = paired.verdict + ("‡" if first.unfinished or second.unfinished else "")
    needed = paired.needed()
    p = "–" if paired.p is None else f"{paired.p:.3f}" if paired.p >= 0.001 else "< 0.001"
    told = [setting, other, gain, str(paired.seeds), p, verdict, "–" if needed is None else str(needed)]
    return [(text, text == verdict and paired.verdict != "not decided") for text in told]
