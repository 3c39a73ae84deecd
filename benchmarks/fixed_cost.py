"""Processor time of a federation that hardly trains: what the processes cost by themselves.

Two sites train a Llama of 50,000 parameters for two rounds, through the launcher. The peer is the same federation in
one process (``deploy.experiment.simulate``), whose model is the same to the last bit.
"""

import contextlib
import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.table import Cell, Table
from deploy.sandbox.flower import ROOT
from deploy.sandbox.tiny import make_federation

SITES = {"site-a": 9, "site-b": 17}  # rows
SAMPLE_SECONDS = 0.1
IN_ONE_PROCESS = """
import sys
from pathlib import Path
from deploy.experiment.simulate import simulate
simulate(Path(sys.argv[1]), Path(sys.argv[2]), 1)
"""
_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER: children of killed parents become ours, so their time is counted, too
#: Patterns of command lines by part; the first match counts.
PARTS = {
    "launcher": r"-m deploy",
    "SuperLink": r"superlink/program\.py|bin/flower-superlink",
    "ServerApp": r"flwr-serverapp",
    "SuperLink's SuperExec": r"superexec",
    "SuperNodes": r"connect/supernode\.py",
    "workers": r"connect/worker\.py",
    "workers' processes": r"worker_process\.py",
}


def run() -> Table:
    """The federation once, by process, and its peer once."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        file = make_federation(Path(temporary), SITES)
        command = [sys.executable, "-m", "deploy", "run", str(file), "--runs", temporary, "--name", "processes"]
        spent, total, wall = measure(command)
        _, peer, peer_wall = measure([sys.executable, "-c", IN_ONE_PROCESS, str(file), f"{temporary}/one"])
    rows: list[dict[str, Cell]] = [
        {"process": f"{name} ({count})" if count > 1 else name, "CPU s": cpu, "of all": cpu / total}
        for name, (count, cpu) in sorted(spent.items(), key=lambda item: -item[1][1])
    ]
    rest = total - sum(cpu for _, cpu in spent.values())
    rows += [
        {"process": "after the last samples", "CPU s": rest, "of all": rest / total},
        {"process": "all", "CPU s": total, "of all": 1.0},
        {"process": "the same in one process", "CPU s": peer, "of all": peer / total},
    ]
    return Table(
        "Processor time of two rounds at two tiny sites, by process",
        rows,
        [
            f"User and system; sampled every {SAMPLE_SECONDS:g} s, but the totals, which are the kernel's.",
            f"Real time {wall:.0f} s and {peer_wall:.0f} s; what a process asks for in regular pauses grows with it.",
        ],
    )


def measure(command: list[str]) -> tuple[dict[str, tuple[int, float]], float, float]:
    """Run a command to its end.

    Returns:
        Number of processes and CPU seconds by part, CPU seconds of all, and real seconds.

    Raises:
        RuntimeError: it failed.
    """
    ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
    seen: dict[tuple[int, float], tuple[str, float]] = {}  # by process id and start
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(seen, over))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began, before = time.monotonic(), _children()
    watch.start()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    finally:
        over.set()
        watch.join()
    _reap()
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout[-3000:]}")
    parts: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, cpu in seen.values():
        count, sum_ = parts[name]
        parts[name] = count + 1, sum_ + cpu
    return dict(parts), _children() - before, time.monotonic() - began


def _watch(seen: dict[tuple[int, float], tuple[str, float]], over: threading.Event) -> None:
    """Note the processor time of every process below this one until it is over."""
    while not over.wait(SAMPLE_SECONDS):
        for process in psutil.Process().children(recursive=True):
            try:
                times, line = process.cpu_times(), " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            name = next((name for name, pattern in PARTS.items() if re.search(pattern, line)), None)
            if name is not None:
                seen[process.pid, process.create_time()] = name, times.user + times.system


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reap() -> None:
    """Reap adopted orphans that have ended: the kernel adds their processor time to ours only then."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
