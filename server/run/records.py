"""A run's records as plain data for the report: no markup, no drawing, no files."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config.section import SERVER as SERVER
from common.metrics import COUNTS, SCORES, Score
from server.run.ages import with_busy
from server.run.events import event_kind, named_in

Record = dict[str, Any]
#: The phases of a round's time, in order; ``aggregate`` is the server's.
PHASES = ("download", "load", "train", "evaluate", "upload", "wait", "aggregate")

Verdict = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True)
class Change:
    """One score of the base model and of the federation's model; None: not measured."""

    score: Score
    before: float | None
    after: float | None

    @property
    def verdict(self) -> Verdict:
        """Whether the score got better or worse; ``same`` when both values agree to the three decimals shown."""
        if self.before is None or self.after is None:
            return "unknown"
        difference = round(self.after, 3) - round(self.before, 3)
        if difference == 0:
            return "same"
        return "better" if (difference < 0) == self.score.lower_is_better else "worse"


@dataclass(frozen=True)
class Result:
    """One evaluation set, at the server or a site, before and after.

    Attributes:
        who: "server" or a site's name.
        version: version (number of training rounds) that the scores "after" belong to; 0: only the base model.
        examples: number of held-out rows that were scored; ``generated``: number of those answered by generation.
    """

    who: str
    version: int
    examples: int | None
    generated: int | None
    changes: dict[str, Change]


@dataclass(frozen=True)
class Bar:
    """One round's time at one site (or the server), in seconds by phase."""

    round: int
    who: str
    seconds: dict[str, float]


@dataclass
class Cost:
    """One site's costs over the whole run: seconds by phase, bytes received, bytes sent."""

    who: str
    rounds: int = 0
    down: float = 0.0
    up: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Participation:
    """A site's part in the run.

    Attributes:
        rows: training rows; None for a site that never joined.
        held_out: held-out rows; None: not told, as by a site that shares no scores.
        privacy: the site's declared noise, in words; empty: no noise.
        rounds: per round "trained", "refused", "failed", "asked" (no answer yet), "busy" (with the work of an earlier
            round) or "absent".
    """

    who: str
    rows: int | None
    held_out: int | None
    device: str
    privacy: str
    rounds: dict[int, str]


@dataclass(frozen=True)
class Problem:
    """A refusal or failure; ``time`` in Unix seconds, ``round`` None before the first."""

    time: float
    round: int | None
    who: str
    what: str
    reason: str


@dataclass(frozen=True)
class Diagnostic:
    """One diagnostic: its name, and per layer group its value by round."""

    name: str
    rounds: list[int]
    groups: dict[str, dict[int, float | None]]


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def order(names: Iterable[str]) -> list[str]:
    """The server first, then the sites by name."""
    return sorted(set(names), key=lambda name: (name != SERVER, natural(name)))


def evaluations(records: list[Record]) -> dict[str, dict[int, Record]]:
    """Evaluation records by site (or server), and by version (number of training rounds)."""
    found: dict[str, dict[int, Record]] = {}
    for record in _of(records, "evaluate"):
        found.setdefault(record["client"], {})[record["round"]] = record.get("evaluate", {})
    return {who: dict(sorted(found[who].items())) for who in order(found)}


def results(records: list[Record]) -> list[Result]:
    """The base model against the newest evaluated one, for every evaluation set."""
    lines = []
    for who, versions in evaluations(records).items():
        last = max(versions)
        base, newest = versions.get(0, {}), versions[last] if last else {}
        known = [score for name, score in SCORES.items() if name in base or name in newest]
        changes = {s.name: Change(s, base.get(s.name), newest.get(s.name)) for s in known}
        size = newest or base
        lines.append(Result(who, last, _whole(size.get("examples")), _whole(size.get("generated")), changes))
    return lines


def shown_scores(lines: list[Result]) -> list[Score]:
    """The scores that occur in any line, in their fixed order."""
    return [score for name, score in SCORES.items() if any(name in line.changes for line in lines)]


def confusion(records: list[Record], labels: list[str]) -> dict[str, list[int]]:
    """Confusion counts of the newest model on the server's own set: right label -> rows per predicted label; or {}."""
    newest = next(reversed(evaluations(records).get(SERVER, {}).values()), {})
    if f"{COUNTS}0/0" not in newest:
        return {}
    return {label: [int(newest[f"{COUNTS}{i}/{j}"]) for j in range(len(labels))] for i, label in enumerate(labels)}


def curve(records: list[Record], key: str) -> dict[str, dict[int, float]]:
    """One score by site (or server) and version; values that are missing or not finite are left out."""
    lines = {
        who: {version: float(scores[key]) for version, scores in versions.items() if scores.get(key) is not None}
        for who, versions in evaluations(records).items()
    }
    return {who: values for who, values in lines.items() if values}


def bars(records: list[Record]) -> list[Bar]:
    """Seconds by phase of every round, the sites first and the server after them.

    The server evaluates the state of round r - 1 while the sites work on round r, so that time is counted to round r.
    """
    found: dict[tuple[int, str], dict[str, float]] = {}
    for record in records:
        who, number = record["client"], record["round"]
        if record["phase"] == "evaluate":
            if who != SERVER:
                continue
            number += 1
        spent = found.setdefault((number, who), {})
        for phase, seconds in record.get("seconds", {}).items():
            if phase in PHASES and seconds:
                spent[phase] = spent.get(phase, 0.0) + float(seconds)
    trained = {record["round"] for record in _of(records, "train")}
    keys = sorted((key for key in found if key[0] in trained), key=lambda k: (k[0], k[1] == SERVER, natural(k[1])))
    return [Bar(number, who, found[number, who]) for number, who in keys if found[number, who]]


def mean_bars(lines: list[Bar]) -> list[Bar]:
    """One bar per site with the mean seconds per round; the bar's round is 0."""
    names = sorted({line.who for line in lines}, key=lambda who: (who == SERVER, natural(who)))
    means = []
    for who in names:
        own = [line.seconds for line in lines if line.who == who]
        means.append(Bar(0, who, {p: sum(s.get(p, 0.0) for s in own) / len(own) for p in PHASES}))
    return means


def costs(records: list[Record]) -> list[Cost]:
    """Totals of every site that trained."""
    found: dict[str, Cost] = {}
    for record in _of(records, "train"):
        cost = found.setdefault(record["client"], Cost(record["client"]))
        moved = record.get("bytes", {})
        cost.rounds += 1
        cost.down += moved.get("down") or 0
        cost.up += moved.get("up") or 0
        for phase, seconds in record.get("seconds", {}).items():
            cost.seconds[phase] = cost.seconds.get(phase, 0.0) + (seconds or 0.0)
    return [found[who] for who in order(found)]


def trainings(records: list[Record]) -> list[Record]:
    """The training records by round and site."""
    return sorted(_of(records, "train"), key=lambda record: (record["round"], natural(record["client"])))


def sites(events: list[Record], rounds: list[int], *, buffered: bool = False) -> list[Participation]:
    """Every site that joined or was sent work, with the site's outcome in each round.

    Args:
        events: the run's events.
        rounds: the rounds.
        buffered: whether slow sites go on while the others begin the next round.
    """
    joined = {e["client"]: e for e in events if e["event"] == "client_joined"}
    outcome: dict[tuple[str, int], str] = {}
    for event in events:
        became = event_kind(event).outcome
        for who in named_in(event) if became else []:
            if became != "failed" or outcome.get((who, event["round"])) == "asked":  # else it failed to evaluate
                outcome[who, event["round"]] = became
    return [
        Participation(
            who,
            joined.get(who, {}).get("num_examples"),
            joined.get(who, {}).get("held_out") or None,
            joined.get(who, {}).get("device", ""),
            _noise(joined.get(who, {}).get("privacy")),
            with_busy({number: outcome.get((who, number), "absent") for number in rounds}, buffered=buffered),
        )
        for who in order([*joined, *(who for who, _ in outcome)])
    ]


def _noise(privacy: Mapping[str, float] | None) -> str:
    """A site's declared differential privacy."""
    if not privacy:
        return ""
    return "clip {clip:.3g}, noise {noise:.3g}, stops at ε {max_epsilon:.3g} (δ {delta:.3g})".format(**privacy)


def rounds_begun(events: list[Record]) -> list[int]:
    """All rounds that were begun."""
    return sorted({event["round"] for event in events if event["event"] == "round_started"})


def problems(events: list[Record]) -> list[Problem]:
    """All refusals and failures of sites, in the order in which they happened."""
    return [
        Problem(event["time"], event.get("round"), event["client"], title, str(event["reason"]))
        for event in events
        if (title := event_kind(event).problem)
    ]


def diagnostics(records: list[Record]) -> list[Diagnostic]:
    """Diagnostics named ``<name>/<layer group>``, by name; one without a group is put under the group "all"."""
    found: dict[str, dict[str, dict[int, float | None]]] = {}
    for record in _of(records, "aggregate"):
        for key, value in record.get("diagnostics", {}).items():
            name, _, group = key.partition("/")
            found.setdefault(name, {}).setdefault(group or "all", {})[record["round"]] = value
    return [
        Diagnostic(name, sorted({number for values in groups.values() for number in values}), _sorted(groups))
        for name, groups in sorted(found.items())
    ]


def _of(records: list[Record], phase: str) -> list[Record]:
    return [record for record in records if record.get("phase") == phase]


def _sorted(groups: Mapping[str, dict[int, float | None]]) -> dict[str, dict[int, float | None]]:
    return {group: groups[group] for group in sorted(groups, key=natural)}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
