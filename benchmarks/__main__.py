"""Run the benchmarks: ``python -m benchmarks [NAME ...]``; without a name, all of them.

Each prints one table and writes it, with the machine it was measured on, to benchmarks/results/NAME.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import (
    averaging,
    downlink,
    fixed_cost,
    flexlora_aggregation,
    galore_refresh,
    many_sites,
    masked_rounds,
    masked_sums,
    memory_peaks,
    memory_table,
    optimizer_step,
    quantised_base,
    server_memory,
    shared_noise,
    slow_site,
    stock_flower,
    strategy_bytes,
    subspaces,
    toy,
    wire_bytes,
)
from benchmarks.gpu import run as gpu
from benchmarks.scale import model, peers, rounds, run as scale
from benchmarks.table import Table, publish
from benchmarks.training_step import run as training_step


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its subject, and how long it takes on two cores."""

    run: Callable[[], Table]
    takes: str


BENCHMARKS = {
    "averaging": Benchmark(averaging.run, "5 minutes"),
    "downlink": Benchmark(downlink.run, "15 minutes"),
    "fixed-cost": Benchmark(fixed_cost.run, "1 minute"),
    "flexlora-aggregation": Benchmark(flexlora_aggregation.run, "10 minutes"),
    "galore-refresh": Benchmark(galore_refresh.run, "5 minutes"),
    "gpu": Benchmark(gpu.run, "8 minutes, of a GPU"),
    "many-sites": Benchmark(many_sites.run, "15 minutes"),
    "many-sites-tuned": Benchmark(many_sites.run_tuned, "10 minutes"),
    "masked-rounds": Benchmark(masked_rounds.run, "10 minutes"),
    "masked-sums": Benchmark(masked_sums.run, "3 minutes"),
    "memory-peaks": Benchmark(memory_peaks.run, "5 minutes"),
    "memory-table": Benchmark(memory_table.run, "8 minutes"),
    "optimizer-step": Benchmark(optimizer_step.run, "3 minutes"),
    "peers": Benchmark(peers.run, "15 minutes; `python -m benchmarks.scale.peers --help` says how it finds NVFlare"),
    "quantised-base": Benchmark(quantised_base.run, "20 minutes"),
    "rounds": Benchmark(rounds.run, "20 minutes"),
    "scale": Benchmark(scale.run, "40 minutes"),
    "scale-model": Benchmark(model.run, "5 seconds, from the results of scale and averaging"),
    "server-memory": Benchmark(server_memory.run, "15 minutes"),
    "shared-noise": Benchmark(shared_noise.run, "2 minutes"),
    "slow-site": Benchmark(slow_site.run, "1 minute"),
    "stock-flower": Benchmark(stock_flower.run, "35 minutes"),
    "strategy-bytes": Benchmark(strategy_bytes.run, "15 minutes"),
    "subspaces": Benchmark(subspaces.run, "30 minutes"),
    "toy": Benchmark(toy.run, "20 minutes"),
    "training-step": Benchmark(training_step.run, "15 minutes, with TRL in another environment"),
    "wire-bytes": Benchmark(wire_bytes.run, "1 minute"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against named peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names or [name for name in BENCHMARKS if name != "gpu" or torch.cuda.is_available()]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"\n{name} (about {BENCHMARKS[name].takes})", flush=True)
        publish(name, BENCHMARKS[name].run())


if __name__ == "__main__":
    main()
