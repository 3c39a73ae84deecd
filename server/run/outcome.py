"""The outcome of a run for the model card, from the run's records: numbers over the sites, none of which is named."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.accountant import cost, epsilon
from common.config.section import SERVER
from common.metrics import SCORES
from common.model.card import PrivacySpent, Spread
from server.run.folder import read_lines


@dataclass(frozen=True)
class Outcome:
    """The outcome, for one round's model.

    Attributes:
        round: number of rounds that made the model.
        sites: number of sites whose updates are in the model.
        chosen: why this round's model.
        by: the metric by which the best round was chosen; None: it is the last.
        scores: scores on the sites' held-out rows, by name.
        privacy: spent by the sites that add noise; None: none does.
    """

    round: int
    sites: int
    chosen: Literal["last", "best"] = "last"
    by: str | None = None
    scores: dict[str, Spread] = field(default_factory=dict)
    privacy: PrivacySpent | None = None


def outcome_of(run_dir: Path, version: int, by: str | None = None) -> Outcome:
    """Collect a run's outcome.

    Args:
        run_dir: the run's folder.
        version: number of rounds that made the model.
        by: the metric by which this round was chosen as the best; None: it is the last.

    Raises:
        RunFolderError: the run's records are damaged.
    """
    records, events = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "events.jsonl")
    trained = {r["client"] for r in records if r["phase"] == "train" and r["round"] <= version}
    return Outcome(
        version, max(len(trained), 1), "last" if by is None else "best", by, _scores(records, version), _spent(events)
    )


def _scores(records: list[dict[str, Any]], version: int) -> dict[str, Spread]:
    """Every score over the sites that tell it, now and of the base model."""

    def told(name: str, after: int) -> list[float]:
        by_site = {
            record["client"]: record["evaluate"].get(name)
            for record in records
            if record["phase"] == "evaluate" and record["round"] == after and record["client"] != SERVER
        }
        return [float(value) for value in by_site.values() if value is not None]

    found = {}
    for name in SCORES:
        if values := told(name, version):
            before = told(name, 0)
            found[name] = Spread(
                mean=statistics.fmean(values),
                deviation=statistics.stdev(values) if len(values) > 1 else None,
                sites=len(values),
                before=statistics.fmean(before) if before else None,
            )
    return found


def _spent(events: list[dict[str, Any]]) -> PrivacySpent | None:
    """The privacy that sites with noise have spent in the run; every update that reached the server counts."""
    sent = Counter(e["client"] for e in events if e["event"] in ("reply", "update_refused", "late_reply"))
    declared: dict[str, list[dict[str, float] | None]] = {}
    for event in events:
        if event["event"] == "client_joined" and sent[event["client"]]:
            declared.setdefault(event["client"], []).append(event["privacy"])
    # A site that joined once without noise is not protected by that of another time.
    noisy = {who: [one for one in told if one] for who, told in declared.items() if all(told)}
    if not noisy:
        return None
    spent = [
        epsilon(sent[who] * max(cost(p["noise"] / p["clip"]) for p in told), min(p["delta"] for p in told))
        for who, told in noisy.items()
    ]
    delta = max(p["delta"] for told in noisy.values() for p in told)
    return PrivacySpent(sites=len(noisy), epsilon=max(spent) if math.isfinite(max(spent)) else None, delta=delta)
