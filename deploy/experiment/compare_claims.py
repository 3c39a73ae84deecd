"""Tests of an experiment's claims: is a strategy better than another, over the same seeds in the same setting?"""

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from common.config.strategy import title_of
from common.metrics import SCORES
from common.web.format import precise, score
from deploy.experiment.compare_data import Comparison, Group

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

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % confidence interval of the mean difference; None with fewer than two pairs."""
        from scipy import stats

        if self.deviation is None:
            return None
        return float(stats.t.isf(_LEVEL / 2, self.seeds - 1) * self.deviation / math.sqrt(self.seeds))

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


@dataclass(frozen=True)
class Tested:
    """A claim in one setting; ``unfinished``: one of the two was best in its last round, so no plateau was seen."""

    group: Group
    better: str
    than: str
    paired: Paired | None
    unfinished: bool


def tested(found: Comparison) -> Iterator[Tested]:
    """Every claim with every strategy that it names, in every setting that has both."""
    how = SCORES[found.select_by]
    for claim in found.claims:
        for group, other in itertools.product(found.groups, claim.than):
            lines = {line.strategy: line for line in group.lines}
            first, second = lines.get(claim.better), lines.get(other)
            if first is not None and second is not None:
                scores = first.by_seed(how.name), second.by_seed(how.name)
                paired = Paired.of(*scores, lower_is_better=how.lower_is_better)
                yield Tested(group, first.strategy, other, paired, first.unfinished or second.unfinished)


def claims(found: Comparison) -> Iterator[tuple[str, list[str], list[list[tuple[str, bool]]]]]:
    """One table per claim: title, heads, and rows of texts, each with whether it decides; empty without claims."""
    gain = f"Gain in {SCORES[found.select_by].in_text}"
    for better, rows in itertools.groupby(tested(found), key=lambda one: one.better):
        heads = ["Setting", "Compared with", gain, "Seeds", "p", "Verdict", "Seeds needed"]
        yield f"{title_of(better)} is better", heads, [_row(one) for one in rows]


def _row(one: Tested) -> list[tuple[str, bool]]:
    paired, place = one.paired, [one.group.title, title_of(one.than)]
    if paired is None:
        return [(text, False) for text in (*place, "–", "0", "–", "not run", "–")]
    gain = score(paired.difference) + ("" if paired.deviation is None else f" ± {precise(paired.deviation)}")
    p = "–" if paired.p is None else f"{paired.p:.3f}" if paired.p >= 0.001 else "< 0.001"
    verdict, needed = paired.verdict + ("‡" if one.unfinished else ""), paired.needed()
    told = [*place, gain, str(paired.seeds), p, verdict, "–" if needed is None else str(needed)]
    return [(text, text == verdict and paired.verdict != "not decided") for text in told]
