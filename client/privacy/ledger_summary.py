"""Summary and verification of a ledger: ``fedspan ledger``."""

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.privacy.ledger import Entry, read, verify
from common.system.command import Command
from common.text import SENTENCE, one_line

_SHOWN = 12  # names of tensors, reasons


@dataclass
class RunStory:
    """The ledger's entries about one run of a federation, added up."""

    strategy: str
    begun: str
    ended: str = ""
    rounds: set[int] = field(default_factory=set)
    charged: int = 0
    evaluations: int = 0
    updates: int = 0
    bytes: int = 0
    rows: set[int] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    bundles: set[str] = field(default_factory=set)
    noised: int = 0
    masked: int = 0


class Story:
    """A ledger's entries, added up for people."""

    def __init__(self) -> None:
        self.site = "unknown"
        self.runs: dict[tuple[str, str], RunStory] = {}
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.mended: list[str] = []
        self.aside: Counter[str] = Counter()
        self.privacy: dict[str, Any] = {}

    def add(self, entry: Entry) -> None:
        """Add an entry."""
        event = entry["event"]
        if event == "begun":
            self.site = entry["site"]
        elif event == "mended":
            self.mended.append(f"line {entry['line']}, {_minute(entry['time'])}: {entry['bytes']} bytes")
        elif event == "charged":
            run = self._run(entry)
            run.charged += entry["message"] == "train"
            run.evaluations += entry["evaluation"]
            self.privacy = entry["privacy"] or self.privacy
        elif event == "sent":
            self._sent(entry)
        else:
            (self.refused if event == "refused" else self.failed)[entry["reason"]] += 1

    def _run(self, entry: Entry) -> RunStory:
        key = (entry["federation"], entry["run"])
        run = self.runs.setdefault(key, RunStory(entry["strategy"], entry["time"]))
        run.ended = entry["time"]
        return run

    def _sent(self, entry: Entry) -> None:
        run = self._run(entry)
        run.rows.add(entry["rows"])
        run.told |= set(entry["told"])
        run.bundles.add(entry["bundle"])
        run.bytes += entry["out"]["bytes"]
        run.tensors |= {name.partition("/")[0] for name in entry["out"]["tensors"]}
        if entry["message"] == "train":
            run.rounds.add(entry["round"])
            run.updates += 1
            run.noised += entry["privacy"] is not None
            run.masked += bool(entry.get("masked"))
            self.privacy = entry["privacy"] or self.privacy
            run.charged += "charged" not in entry  # by a version that counted what had left
        if entry.get("aside"):
            self.aside[entry["aside"]] += 1


def summary(path: Path, head: str | None = None) -> str:
    """All data that left the site, in words, for the site's data-protection officer.

    Raises:
        LedgerError: the ledger is damaged.
    """
    story = Story()
    ledger = read(path, story.add, head)
    lines = [f"What left site {one_line(story.site, SENTENCE)}, by its ledger {path}", ""]
    lines += [f"The ledger has {ledger.lines} entries, none of them changed. Its head, to be noted elsewhere:"]
    lines += [f"  {ledger.head}", ""]
    for (federation, number), run in story.runs.items():
        lines += _run(federation, number, run)
    if not story.runs:
        lines += ["Nothing has left this site.", ""]
    lines += _privacy(story)
    lines += _counted("Refused by this site's policy", story.refused)
    lines += _counted("Answered with an error, whose text left", story.failed)
    lines += _counted("Went wrong here, and was not told", story.aside)
    if story.mended:
        lines += ["Lines without an end, left by a crash, of which nothing had left the site:"]
        lines += [f"  {text}" for text in story.mended] + [""]
    lines += ["Nothing but what is listed here left through FedSpan: no row, prompt, answer or generated text. Tensors"]
    lines += ["that left without noise may still reveal something about the rows that they were trained on."]
    return "\n".join(lines)


def _run(federation: str, number: str, run: RunStory) -> list[str]:
    rows = " to ".join(f"{n:,}" for n in sorted({min(run.rows), max(run.rows)})) if run.rows else "none"
    rounds = f"{len(run.rounds)}" + (f" ({min(run.rounds)} to {max(run.rounds)})" if run.rounds else "")
    return [
        one_line(f"Federation {federation}, strategy {run.strategy}, run {number}", SENTENCE),
        f"  from, to         {_minute(run.begun)}, {_minute(run.ended)} UTC",
        f"  rounds trained   {rounds}; {run.charged} charged, {run.updates} updates sent, {run.noised} of them noised",
        *(
            [f"  masked           {run.masked} of these updates: the server sees sums of them alone"]
            if run.masked
            else []
        ),
        f"  evaluations      {run.evaluations} of held-out rows",
        f"  bytes of tensors {run.bytes:,}",
        f"  training rows    {rows} (the number leaves, the rows do not)",
        f"  tensors          {_some(run.tensors)}",
        f"  numbers, facts   {_some(run.told)}",
        f"  code (bundle)    {_some(run.bundles)}",
        "",
    ]


def _privacy(story: Story) -> list[str]:
    updates, noised = sum(r.updates for r in story.runs.values()), sum(r.noised for r in story.runs.values())
    spent = story.privacy
    if not spent:
        return ["Differential privacy: none; no noise was added to what left.", ""] if updates else []
    lines = [
        f"Differential privacy: {noised} updates were clipped to {spent['clip']:g} and noised; what was charged spent",
        f"  epsilon {spent['epsilon_total']:.4g} at delta {spent['delta']:g}, of at most {spent['max_epsilon']:g}.",
    ]
    if spent.get("noise") == "shared":
        worst, parts = spent["epsilon_worst"], f"the server and {spent['colluders']} other sites together"
        lines += [
            f"  The noise is shared: this epsilon holds against {parts}, who see sums only. Against the server and so",
            f"  many sites that they know all other noise: epsilon {'above 500' if worst is None else f'{worst:.4g}'}.",
        ]
    if noised < updates:
        lines += [f"  {updates - noised} updates left WITHOUT noise; this epsilon says nothing about them."]
    return [*lines, ""]


def _counted(title: str, reasons: "Counter[str]") -> list[str]:
    if not reasons:
        return []
    shown = [f"  {count:4} x {one_line(reason, SENTENCE)}" for reason, count in reasons.most_common(_SHOWN)]
    more = len(reasons) - len(shown)
    return [f"{title}:", *shown, *([f"  and {more} other reasons"] if more else []), ""]


def _some(names: set[str]) -> str:
    if not names:
        return "none"
    shown = [one_line(name, SENTENCE) for name in sorted(names)[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the ledger that the site file names")
    parser.add_argument("--head", metavar="HASH", help="hash of a line that was noted elsewhere, to be found in it")


def _verify(options: argparse.Namespace) -> None:
    ledger = verify(options.file, options.head)
    print(f"{options.file}: {ledger.lines} lines, none changed; head {ledger.head}")  # noqa: T201


VERIFY = Command(
    _arguments,
    _verify,
    example="site-a-ledger.jsonl",
    then="a note of the head in another place, for --head at the next time",
    notes="Finds any line that was edited, inserted, removed, moved or cut off.",
)
SUMMARY = Command(
    _arguments,
    lambda options: print(summary(options.file, options.head)),  # noqa: T201
    example="site-a-ledger.jsonl",
    then="fedspan ledger verify FILE --head HASH",
)
