"""Seconds and peak memory of an optimizer step: FedSpan's loop, transformers' Trainer and TRL's SFTTrainer.

The same model, rows, batches and settings, one thread each, in processes whose steps take turns, because a shared
machine is never quiet. Processor seconds count, the least of all steps; wall-clock seconds are there, too.
"""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks.table import Cell, Table
from benchmarks.training_step.cases import CASES
from benchmarks.training_step.sides import MARK
from deploy.demo.prepare import DEFAULT_CACHE, prepare

ROOT = Path(__file__).parents[2]
SIDES = ("FedSpan", "FedSpan, padded", "Trainer", "SFTTrainer")
TRL = "trl==1.16.0"
STEPS, WARM = 5, 2  # the first steps make bases and fill caches


def run() -> Table:
    """All cases."""
    prepare(DEFAULT_CACHE)
    rows = [row for name in CASES for row in measure(name, SIDES, STEPS)]
    return Table(
        "A training step: seconds and peak memory against transformers' Trainer and TRL's SFTTrainer",
        rows,
        [
            f"cpu s: processor seconds of a step on one thread, the least of {STEPS - WARM}; wall s: the median, on a "
            "machine with other work.",
            "x faster: processor seconds of that row / those of FedSpan. loss off: largest relative difference of a "
            "step's loss to FedSpan's.",
            "FedSpan, padded: `training.packing: off`. Peers of LoRA: PEFT's model, torch's AdamW; of FedFTG: "
            "`optim=galore_adamw` on the same matrices,",
            "whose subspace is from another decomposition, so losses drift apart from the second step on.",
        ],
    )


def measure(name: str, sides: tuple[str, ...], steps: int) -> list[dict[str, Cell]]:
    """One case: the sides' steps in turn."""
    case = CASES[name]
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with _started(name, sides, steps) as pipes:
        for number in range(steps + 1):  # the first answer says that a side is ready
            for side, (to, answers) in pipes.items():
                if number:
                    to.write("\n")
                    to.flush()
                taken[side].append(_answer(side, answers))
    table: list[dict[str, Cell]] = []
    first = taken[sides[0]][1:]
    for side in sides:
        done = taken[side][1:]
        cpu = min(step["cpu"] for step in done[WARM:])
        off = max(abs(one["loss"] - own["loss"]) / own["loss"] for one, own in zip(done, first, strict=True))
        table.append(
            {
                "model": case.model,
                "method": case.method + (", long rows" if case.long else ""),
                "side": side,
                "cpu s": cpu,
                "wall s": median(step["wall"] for step in done[WARM:]),
                "x faster": cpu / min(step["cpu"] for step in first[WARM:]),
                "peak MB": done[-1]["peak"] / 1e6,
                "loss off": off,
            }
        )
    return table


@contextmanager
def _started(name: str, sides: tuple[str, ...], steps: int) -> Iterator[dict[str, tuple[IO[str], IO[str]]]]:
    """The sides' processes: where to write and where to read."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for side in sides:
            python = _with_trl() if side == "SFTTrainer" else sys.executable
            command = [python, "-m", "benchmarks.training_step.sides", name, side, str(steps)]
            processes[side] = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **quiet},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        yield {side: (p.stdin, p.stdout) for side, p in processes.items() if p.stdin and p.stdout}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def _answer(side: str, answers: IO[str]) -> dict[str, float]:
    for line in answers:
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK)))
    raise RuntimeError(f"{side} ended; its error is above")


def _with_trl() -> str:
    """A Python that has TRL over this one's packages; installed once, beside the demo's cache."""
    if find_spec("trl") is not None:
        return sys.executable
    folder = DEFAULT_CACHE.parent / "trl"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, clear=True, with_pip=False)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "beneath.pth").write_text("\n".join(ours) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), TRL]
        subprocess.run(command, check=True)
        (folder / "ready").touch()
    return str(python)
