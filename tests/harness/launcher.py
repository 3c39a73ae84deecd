"""Runs the launcher as its user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
FEDSPAN = [sys.executable, "-m", "deploy"]


def command(federation: Path, *options: str) -> list[str]:
    return [*FEDSPAN, "run", str(federation), "--runs", str(federation.parent / "runs"), *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def launch(federation: Path, *options: str, timeout: float = 480.0) -> subprocess.CompletedProcess[str]:
    """Run a federation to its end."""
    return subprocess.run(
        command(federation, *options), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def start(federation: Path, *options: str) -> subprocess.Popen[str]:
    """Start a federation and return at once."""
    return subprocess.Popen(
        command(federation, *options), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def survivors(federation: Path) -> list[str]:
    """Command lines of living processes that belong to a run of ``federation``."""
    left = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("FLWR_HOME", "")
            if home.startswith(str(federation.parent)) and process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
