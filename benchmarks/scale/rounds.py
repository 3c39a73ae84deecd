"""Whether a server grows with its rounds: light sites, many rounds, and what its processes hold in each part of them.

    python -m benchmarks rounds                                    # 400 rounds of 8 sites
    python -m benchmarks.scale.rounds --sites 8 --rounds 400 --small    # a smaller model: 0.4 MB a message, not 2.95

A part's figure is the median of its rounds' peaks, because a round's work and its end differ by whole states.
"""

import argparse
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.scale.run import DEMO, SMALL, Done, Sizes, federate
from benchmarks.scale.watch import Sample
from benchmarks.table import Cell, Table, publish

SITES, ROUNDS = 8, 400
MEASURED: dict[str, Callable[[Sample], float]] = {
    "MB": lambda one: one.memory / 1e6,
    "descriptors": lambda one: one.descriptors,
    "threads": lambda one: one.threads,
}


def run() -> Table:
    """400 rounds of 8 sites."""
    return measured(SITES, ROUNDS, DEMO)


def measured(count: int, rounds: int, sizes: Sizes) -> Table:
    """So many rounds of so many light sites, in ten parts."""
    done, size = federate(count, rounds=rounds, sizes=sizes), max(1, rounds // 10)
    up = next(one["bytes_up"] for one in done.events if one["event"] == "round_finished") / count
    return Table(
        f"What a server holds over its rounds: {count} light sites, a shared basis, {up / 1e6:.2f} MB a message",
        over_rounds(done, size),
        [
            f"Of {size} rounds the median of their peaks, sampled; s: the mean of a round, checkpoint included.",
            "MB: resident memory; the database at the part's end, with its journals.",
        ],
    )


def over_rounds(done: Done, size: int) -> list[dict[str, Cell]]:
    """A row for every ``size`` rounds of a run: what each process of the server held, and the database.

    Args:
        done: the run.
        size: rounds of a row; the last row may have fewer.
    """
    ends = [one["time"] for one in done.events if one["event"] == "round_finished"]
    began = next(one["time"] for one in done.events if one["event"] == "round_started")
    parts = list(dict.fromkeys(one.part for one in done.watch.samples))
    rows: list[dict[str, Cell]] = []
    for first in range(0, len(ends), size):
        last = min(first + size, len(ends))
        row: dict[str, Cell] = {"rounds": f"{first + 1} to {last}"}
        row["s"] = (ends[last - 1] - (ends[first - 1] if first else began)) / (last - first)
        for part in parts:
            seen = [one for one in done.watch.samples if one.part == part]
            for name, value in MEASURED.items():
                peaks = _peaks([(one.time, value(one)) for one in seen], [began, *ends])
                row[f"{part} {name}"] = median(one for one in peaks[first:last] if one is not None)
        row["database MB"] = max(size for at, size in done.watch.database if at <= ends[last - 1]) / 1e6
        rows.append(row)
    return rows


def _peaks(seen: Sequence[tuple[float, float]], bounds: Sequence[float]) -> list[float | None]:
    """The largest value between each two bounds; None where nothing was seen."""
    peaks: list[float | None] = [None] * (len(bounds) - 1)
    for at, value in seen:
        number = bisect_right(bounds, at) - 1
        if 0 <= number < len(peaks):
            peaks[number] = max(value, peaks[number] or 0.0)
    return peaks


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.rounds", description=__doc__)
    parser.add_argument("--sites", type=int, default=SITES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    publish("rounds", measured(options.sites, options.rounds, SMALL if options.small else DEMO))


if __name__ == "__main__":
    main()
