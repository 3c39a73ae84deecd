"""A round beside training in FedSpan, NVFlare and stock Flower: the same weights, light sites, a process for each.

    python -m venv /tmp/nvflare && /tmp/nvflare/bin/pip install nvflare==2.9.0 torch
    NVFLARE_PYTHON=/tmp/nvflare/bin/python python -m benchmarks peers
    NVFLARE_PYTHON=/tmp/nvflare/bin/python python -m benchmarks.scale.peers --repeats 1 --rounds 2    # a look

Thirty matrices of 576 x 1536 as in the demo, 106 MB. FedSpan's sites answer with factors of rank 16, those of the peers
with all weights, after nothing but an addition: a round is what it costs beside training. Stock Flower starts a process
for each message, which imports PyTorch and loads no model; the sites' processes of NVFlare and FedSpan stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median

from benchmarks.scale.run import STRATEGIES, light_federation, measure
from benchmarks.table import Cell, Table, publish
from deploy.sandbox.flower import ROOT, Flower

SITES, ROUNDS, REPEATS = 4, 5, 3
NVFLARE = ROOT / "benchmarks" / "nvflare_app" / "job.py"


def run(repeats: int = REPEATS, rounds: int = ROUNDS) -> Table:
    """All four, one after the other, several times over: what else the machine does meets all of them.

    Args:
        repeats: how often each is run.
        rounds: rounds of each run, from 2.

    Raises:
        RuntimeError: there is no NVFlare, or a run failed.
    """
    python = os.environ.get("NVFLARE_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import nvflare, torch"], capture_output=True, check=False).returncode:
        raise RuntimeError(f"{python} has no nvflare and torch; set NVFLARE_PYTHON as {__name__} says:\n{__doc__}")
    kinds: dict[str, Callable[[int], tuple[float, float, float]]] = {
        "FedSpan, own bases": partial(ours, "fedftg-own"),
        "FedSpan, shared basis": partial(ours, "fedftg"),
        "NVFlare 2.9, FedAvg": partial(nvflare, python),
        "stock Flower 1.39, FedAvg": stock,
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    loads = []
    for _ in range(repeats):
        for name, one in kinds.items():
            found[name].append(one(rounds))
            loads.append(os.getloadavg()[0])
            print(f"{name}: {found[name][-1][0]:.2f} s a round, load {loads[-1]:.1f}", flush=True)
    rows: list[dict[str, Cell]] = []
    for name, measured in found.items():
        seconds = [one[0] for one in measured]
        row: dict[str, Cell] = {"federation": name, "sites": SITES, "round s": median(seconds)}
        row |= {"least s": min(seconds), "most s": max(seconds)}
        rows.append(row | {"MB down": measured[0][1] / 1e6, "MB up": measured[0][2] / 1e6})
    return Table(
        "A round beside training: light sites, a process for each, and the demo's weights (106 MB)",
        rows,
        [
            f"round s: of {repeats} runs in turn, the median; of a run, the mean of {rounds} rounds, of the peers",
            "without the first. MB: of tensors, a site and round.",
            f"Load of the machine while it was measured (1 minute): {min(loads):.1f} to {max(loads):.1f}.",
        ],
    )


def ours(strategy: str, rounds: int) -> tuple[float, float, float]:
    """Seconds of a round, and bytes down and up of a site."""
    row = measure(SITES, strategy, rounds=rounds, apart=True)
    down, up = (1e6 * float(str(row[key])) / SITES for key in ("down MB", "up MB"))
    return float(str(row["round s"])), down, up


def nvflare(python: str, rounds: int) -> tuple[float, float, float]:
    """Seconds and bytes as for ``ours``: from one site's weights to its next."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [python, str(NVFLARE), str(SITES), str(rounds), folder]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        told = [json.loads(file.read_text()) for file in Path(folder).glob("site-*.json")]
    if done.returncode or len(told) != SITES or any(len(one["came"]) != rounds for one in told):
        raise RuntimeError(f"NVFlare (NVFLARE_PYTHON={python}): {done.stdout[-1000:]}{done.stderr[-1000:]}")
    came = [max(one["came"][number] for one in told) for number in range(rounds)]
    size = told[0]["bytes"]
    return (came[-1] - came[0]) / (rounds - 1), size, size


def stock(rounds: int) -> tuple[float, float, float]:
    """Seconds and bytes as for ``ours``."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        file, out = light_federation(folder, SITES, STRATEGIES["fedftg-own"], rounds), folder / "stock.json"
        with Flower(folder / "stock", threads=1) as flower:
            for number in range(SITES):
                flower.start_node(f"site-{number}", "")
            wanted: dict[str, str | int] = {"federation": str(file), "rounds": rounds, "out": str(out), "light": 1}
            flower.submit(ROOT / "benchmarks" / "stock_app", wanted)
            flower.wait(3600)
        measured = json.loads(out.read_text(encoding="utf-8"))
    kept = measured["rounds"][1:]
    return fmean(one["seconds"] for one in kept), measured["down"], fmean(one["up"] for one in kept)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    publish("peers", run(options.repeats, options.rounds))


if __name__ == "__main__":
    main()
