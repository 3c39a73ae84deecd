"""Rounds of a real federation with masked sums, and of the same without: seconds, and CPU by process.

    python -m benchmarks masked-rounds

``fedspan run`` starts the server, and a link and a worker for each site, all on this machine. The model is tiny
(FFA-LoRA), so a round costs little but its messages. Each form runs several times, in turn, so that both meet the same
load; CPU seconds do not depend on it.
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.table import Cell, Table
from common.system.processes import ProcessGroup
from deploy.sandbox.flower import ROOT
from deploy.sandbox.tiny import make_federation
from server.run.folder import read_lines, read_run

SITES, ROUNDS, TIMES = 10, 6, 3
SAMPLE_SECONDS, LONGEST = 0.2, 1200.0
#: Patterns of command lines by role.
ROLES = {
    "SuperLink": "superlink/program.py",
    "ServerApp": "flwr-serverapp",
    "links": "connect/supernode.py",
    "workers": "connect/worker_process.py",
    "supervisors": "connect/worker.py",
}
SETTINGS: dict[str, Any] = {
    "strategy": {"name": "ffa-lora", "rank": 4, "lora_alpha": 8.0},
    "evaluation": {"every": 100, "max_examples": 1, "samples": 0},
    "cohort": {"join_deadline": LONGEST, "round_deadline": LONGEST},
    "rounds": ROUNDS,
}


def run() -> Table:
    """Ten sites without and with masks, in turn; the best of several runs."""
    found: dict[str, list[dict[str, Cell]]] = {"no": [], "yes": []}
    for _ in range(TIMES):
        for masked, rows in found.items():
            rows.append(measure(SITES, masked=masked == "yes"))
    rows = [min(rows, key=lambda row: float(str(row["round s"]))) for rows in found.values()]
    return Table(
        f"A round of {SITES} sites and the server on one machine, with masked sums and without",
        rows,
        [
            f"round s: the median of the rounds after the first, in the fastest of {TIMES} runs.",
            "CPU s: of one round, all processes of a kind together; the mean of the same rounds.",
        ],
    )


def measure(sites: int, *, masked: bool) -> dict[str, Cell]:
    """One run.

    Raises:
        RuntimeError: it did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        secure = {"secure_aggregation": {"threshold": sites // 2 + 1}} if masked else {}
        file = make_federation(folder, {f"s{k}": 12 for k in range(sites)}, **SETTINGS, **secure)
        done = folder / "runs" / "run"
        command = [sys.executable, "-m", "deploy", "run", str(file), "--runs", str(done.parent), "--name", done.name]
        samples: list[tuple[float, dict[str, float]]] = []
        with ProcessGroup(folder / "logs") as group:
            started = group.start("run", command, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
            over = threading.Event()
            watch = threading.Thread(target=_watch, args=(psutil.Process(started.process.pid), samples, over))
            watch.start()
            started.process.wait(LONGEST)
            over.set()
            watch.join()
        if read_run(done).get("status") != "completed":
            raise RuntimeError(f"{read_run(done).get('reason')}; {(folder / 'logs' / 'run.log').read_text()[-3000:]}")
        events = [one for one in read_lines(done / "events.jsonl") if one.get("round", 0) > 1]
    finished = [one for one in events if one["event"] == "round_finished"]
    began = next(one["time"] for one in events if one["event"] == "round_started")
    row: dict[str, Cell] = {"masked": "yes" if masked else "no", "sites": sites}
    row["round s"] = statistics.median(one["seconds"] for one in finished)
    used = _used(samples, began, finished[-1]["time"])
    row |= {f"{role} CPU s": used[role] / len(finished) for role in ROLES}
    return row | {"CPU s": sum(used.values()) / len(finished)}


def _used(samples: list[tuple[float, dict[str, float]]], began: float, ended: float) -> dict[str, float]:
    """CPU seconds by role between two times."""
    first, last = (min(samples, key=lambda one: abs(one[0] - at))[1] for at in (began, ended))
    return {role: last.get(role, 0.0) - first.get(role, 0.0) for role in ROLES}


def _watch(launcher: psutil.Process, samples: list[tuple[float, dict[str, float]]], over: threading.Event) -> None:
    """Note the CPU seconds of each role until it is over."""
    roles: dict[int, str] = {}
    while not over.wait(SAMPLE_SECONDS):
        used = dict.fromkeys(ROLES, 0.0)
        for child in launcher.children(recursive=True):
            try:
                if child.pid not in roles:
                    line = " ".join(child.cmdline())
                    roles[child.pid] = next((role for role, pattern in ROLES.items() if pattern in line), "")
                if role := roles[child.pid]:
                    times = child.cpu_times()
                    used[role] += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        samples.append((time.time(), used))
