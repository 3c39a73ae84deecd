"""Run the benchmarks: ``python -m benchmarks [NAME ...]``; without a name, all of them.

Each prints one table and writes it, with the machine it was measured on, to benchmarks/results/NAME.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import flexlora_aggregation, galore_refresh, strategy_bytes
from benchmarks.table import Table, publish


@dataclass(frozen=True)
class Benchmark:
    """What is measured, and how long that takes on two cores."""

    run: Callable[[], Table]
    takes: str


BENCHMARKS = {
    "flexlora-aggregation": Benchmark(flexlora_aggregation.run, "10 minutes"),
    "galore-refresh": Benchmark(galore_refresh.run, "1 minute"),
    "strategy-bytes": Benchmark(strategy_bytes.run, "15 minutes"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against named peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"\n{name} (about {BENCHMARKS[name].takes})", flush=True)
        publish(name, BENCHMARKS[name].run())


if __name__ == "__main__":
    main()
