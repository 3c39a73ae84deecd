"""A benchmark's rows on the screen and as JSON, with the machine that they were measured on."""

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table as Grid

RESULTS = Path(__file__).parent / "results"
Cell = str | int | float | None


@dataclass
class Table:
    """A table of measurements.

    Attributes:
        title: subject of the measurement, and the peer.
        rows: one mapping from column to value each.
        notes: how to read the columns.
    """

    title: str
    rows: list[dict[str, Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def publish(name: str, table: Table) -> None:
    """Print a table and write it to benchmarks/results/NAME.json."""
    console = Console(width=160)
    grid = Grid(title=table.title, box=box.SIMPLE, title_justify="left")
    for column in table.rows[0]:
        grid.add_column(column, justify="left" if isinstance(table.rows[0][column], str) else "right")
    for row in table.rows:
        grid.add_row(*[_text(value) for value in row.values()])
    console.print(grid, *table.notes, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    result = {"benchmark": name, "title": table.title, "machine": machine(), "notes": table.notes, "rows": table.rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Cell]:
    """The machine and the versions that the measurement depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
    }


def _text(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:,.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value
