"""Seconds and peak memory of an optimizer step: FedSpan's loop, transformers' Trainer and TRL's SFTTrainer.

    python -m benchmarks training-step                 # all cases
    python -m benchmarks.training_step.run             # those that benchmarks/results does not have from this machine
    python -m benchmarks.training_step.run lora fedftg # these; the rows of the others stay

The same model, rows, batches and settings, one thread each, in processes whose steps take turns, because a shared
machine is never quiet. Processor seconds count, the least of all steps; wall-clock seconds are there, too. Results are
written after every case.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks.table import RESULTS, Cell, Table, machine, publish
from benchmarks.training_step.cases import CASES
from benchmarks.training_step.sides import MARK
from deploy.demo.prepare import DEFAULT_CACHE, prepare

ROOT = Path(__file__).parents[2]
NAME = "training-step"
SIDES = ("FedSpan", "FedSpan, padded", "Trainer", "SFTTrainer")
TRL = "trl==1.16.0"
STEPS, WARM = 8, 2  # the first steps make bases and fill caches


def run() -> Table:
    """All cases."""
    return measured(list(CASES), [])


def measured(names: Sequence[str], kept: list[dict[str, Cell]]) -> Table:
    """These cases beside the rows of others that are there already; published after every case."""
    prepare(DEFAULT_CACHE)
    for name in names:
        began = time.monotonic()
        kept = [row for row in kept if row["case"] != name] + measure(name, SIDES, STEPS)
        kept.sort(key=lambda row: list(CASES).index(str(row["case"])))
        publish(NAME, table(kept))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return table(kept)


def table(rows: list[dict[str, Cell]]) -> Table:
    """The rows with their explanation."""
    return Table(
        "A training step: seconds and peak memory against transformers' Trainer and TRL's SFTTrainer",
        rows,
        [
            f"cpu s: processor seconds of a step on one thread, the least of {STEPS - WARM}; wall s: the median.",
            "first: processor seconds of the first step, which under FedFTG makes the bases, at a site once a round.",
            "x cpu, x wall: that row's seconds / FedSpan's. FedSpan, padded: `training.packing: off`.",
            f"loss off: largest relative difference of a step's loss to FedSpan's, of {STEPS} steps; loss from, to: of "
            "the first and the last.",
            "Peers of LoRA: PEFT's model, torch's AdamW; of FedFTG: `optim=galore_adamw` of galore-torch on the same "
            "matrices, with bases by full SVD; nothing is clipped.",
            "Long rows: seven of the demo's in one.",
        ],
    )


def there() -> list[dict[str, Cell]]:
    """The rows that were published from this machine."""
    file = RESULTS / f"{NAME}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return list(found["rows"]) if found.get("machine") == machine() else []


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
    rows: list[dict[str, Cell]] = []
    first = taken[sides[0]][1:]
    for side in sides:
        done = taken[side][1:]
        off = max(abs(one["loss"] - own["loss"]) / own["loss"] for one, own in zip(done, first, strict=True))
        rows.append(
            {
                "case": name,
                "model": case.model,
                "method": f"{case.method} r {case.rank}" + (", long rows" if case.long else ""),
                "side": side,
                "cpu s": _cpu(done),
                "x cpu": _cpu(done) / _cpu(first),
                "wall s": _wall(done),
                "x wall": _wall(done) / _wall(first),
                "first": done[0]["cpu"],
                "peak MB": done[-1]["peak"] / 1e6,
                "loss from": done[0]["loss"],
                "to": done[-1]["loss"],
                "loss off": off,
            }
        )
    return rows


def _cpu(steps: list[dict[str, float]]) -> float:
    return min(step["cpu"] for step in steps[WARM:])


def _wall(steps: list[dict[str, float]]) -> float:
    return median(step["wall"] for step in steps[WARM:])


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step.run")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: those still missing of {', '.join(CASES)}")
    named, kept = parser.parse_args().cases, there()
    if unknown := [name for name in named if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    measured(named or [name for name in CASES if all(row["case"] != name for row in kept)], kept)


if __name__ == "__main__":
    main()
