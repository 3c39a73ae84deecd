"""All cases within eight minutes: ``python -m benchmarks.gpu.run [--twin] [--seconds N] [--out FILE]``.

Each case has a process of its own; one that runs out of memory, dies or takes too long is a row of the table and not
the end. Results are written after every case. ``--twin``: tiny shapes, on the CPU where there is no GPU.
"""

import argparse
import json
import multiprocessing as mp
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.gpu.case import METHODS, Case, Told, measure
from benchmarks.table import RESULTS, Cell, Table, machine, publish

ROOT = Path(__file__).parents[2]
SECONDS, LONGEST = 480.0, 90.0  # for everything, and for one case
CURVE = 50  # steps of the curves in two types
NO_GPU = "no CUDA device here; tiny shapes on the CPU: python -m benchmarks.gpu.run --twin"


def cases(*, twin: bool) -> list[Case]:
    """The cases, those that are wanted most first."""
    if twin:
        return [Case("tiny", method, rank=8, rows=2, width=16, steps=3, warm=1) for method in METHODS]
    small = [Case("1B", method) for method in METHODS]
    large = [Case("8B", method, checkpointing=True) for method in METHODS]
    return [*large[1:3], *small[:4], large[0], large[3], small[5], large[5], small[4], large[4]]


def curves(*, twin: bool) -> list[Case]:
    """The same training in bfloat16 and in float32."""
    base = Case("tiny", "GaLore", rank=8, rows=2, width=16) if twin else Case("1B", "GaLore", rows=2, width=256)
    return [replace(base, method=m, dtype=d, steps=CURVE) for m in ("GaLore", "LoRA") for d in ("float32", "bfloat16")]


def run() -> Table:
    """For ``python -m benchmarks gpu``."""
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    return everything(SECONDS, twin=False)


def everything(seconds: float, *, twin: bool, out: Path | None = None) -> Table:
    """The suite's tests on the GPU, the curves and all cases, within so many seconds."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Cell]] = []
    table = Table("Training on one device with weights made here", rows, _notes())

    def add(what: str, case: Case, told: Told) -> None:
        short: dict[str, Cell] = {"what": what, "model": case.shape, "method": case.method, "type": case.dtype}
        rows.append(short | {key: told.get(key) for key in COLUMNS} | {"fault": told.get("fault")})
        print(f"{time.monotonic() - end + seconds:5.0f} s  {rows[-1]}", flush=True)
        if out is not None:
            text = json.dumps({"machine": machine(), "rows": rows, "notes": table.notes}, indent=2)
            out.write_text(text + "\n", encoding="utf-8")

    for case in cases(twin=twin):
        add("memory", case, in_process(case, min(LONGEST, end - time.monotonic())))
    for case in curves(twin=twin):
        add(f"{CURVE} steps", case, in_process(case, min(LONGEST, end - time.monotonic())))
    if not twin:
        table.notes.append(tests(end - time.monotonic()))
    return table


COLUMNS = (
    "peak GB",
    "at rest GB",
    "tokens / s",
    "J / 1000 tokens",
    "rows at once",
    "loss first",
    "loss last",
    "losses",
)


def _notes() -> list[str]:
    return [
        "LoRA, QLoRA: rank 16 in all linear layers. GaLore, galore-torch: rank 128 on the same layers. FedFTG on nf4: "
        "GaLore, rank 128, MLPs of the lower third, the rest in 4 bit.",
        "4 rows of 512 tokens a step, half of them count; 8B with gradient checkpointing. Peak: CUDA's allocator's, on "
        "a CPU, resident. J: of the whole card, as its driver counts.",
    ]


def in_process(case: Case, seconds: float) -> Told:
    """Measure a case in a new process, for so long; ``fault`` says why there is no result."""
    if seconds < 1:
        return {"fault": "not run: out of time"}
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.case"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(case, there))
    process.start()
    there.close()
    try:
        told: Told = here.recv() if here.poll(seconds) else {"fault": f"took longer than {seconds:.0f} s"}
    except EOFError:
        process.join(10)
        told = {"fault": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return told


def _report(case: Case, to: Connection) -> None:
    """Send what was measured, or why not."""
    try:
        told = measure(case)
    except torch.OutOfMemoryError:
        told = {"fault": f"out of memory ({torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB)"}
    except Exception as error:  # noqa: BLE001 - a row of the table
        told = {"fault": f"{type(error).__name__}: {str(error)[:200]}"}
    to.send(told)


def tests(seconds: float) -> str:
    """The outcome of the suite's tests that need a GPU, in one line."""
    if seconds < 10:
        return "Tests on the GPU: not run, out of time."
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"Tests on the GPU: no result within {seconds:.0f} s."
    return f"Tests on the GPU: {(done.stdout.strip() or done.stderr.strip()).rpartition(chr(10))[2]}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description="Measure training on a GPU.")
    parser.add_argument("--twin", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON, written after every case")
    args = parser.parse_args()
    if not args.twin and not torch.cuda.is_available():
        parser.error(NO_GPU)
    table = everything(args.seconds, twin=args.twin, out=args.out or (None if args.twin else RESULTS / "gpu.json"))
    if not args.twin:
        publish("gpu", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
