"""A round of 1,000 sites of an 8B model, computed from what was measured with up to 256 light sites.

    python -m benchmarks scale-model            # the tables of docs/scale.md; tests hold the page against them
    python -m benchmarks.scale.model            # writes them into the page, after new measurements

Nothing here is measured. Every cost is taken to grow with messages, bytes or multiplications as in the measured runs:
4 to 256 sites, and messages of one size and of four times that. The runs are read from benchmarks/results.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.table import RESULTS, Cell, Table
from benchmarks.wire_bytes import weight_bytes
from common.linalg.subspace import SharedBasis
from common.protocol.factors import Exchange

SITES, LINK, CORES, MEMORY = 1000, 10e9 / 8, 16, 128e9  # bytes a second each way; of the server's machine
#: An 8B model (Llama-3-8B): (rows, columns) of a block's weights and how many of them; 32 blocks.
MLP = {(14336, 4096): 2, (4096, 14336): 1}
ATTENTION = {(4096, 4096): 2, (1024, 4096): 2}
BLOCKS, THIRD = 32, 10
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
ROUNDS = 3  # every measured run has so many
SECONDS = ("link", "SuperLink", "ServerApp")


@dataclass(frozen=True)
class Constants:
    """Costs of the server on the machine that was measured.

    Attributes:
        link: CPU seconds of the SuperLink for a site and round whose messages are empty.
        link_byte: CPU seconds of the SuperLink for a byte that a site sends or receives.
        app: as ``link``, of the ServerApp.
        app_byte: CPU seconds of the ServerApp for a byte that a site sends.
        memory: bytes of the SuperLink's memory for a byte of a round's replies.
        rate: multiplications and additions of the server's averaging in a second, one thread.
    """

    link: float
    link_byte: float
    app: float
    app_byte: float
    memory: float
    rate: float


@dataclass(frozen=True)
class Way:
    """A way to train the model.

    Attributes:
        up: bytes that a site sends in a round.
        down: bytes that a site receives; with ``same`` the same ones for all.
        products: multiplications and additions of the server in a round, beside what grows with bytes.
    """

    up: float
    down: float
    products: float


def measured() -> list[dict[str, Any]]:
    """The runs that the costs are fitted to: FedFTG with a shared basis, without TLS."""
    return [r for r in _rows("scale") if r["TLS"] == "no" and r["strategy"] in ("fedftg", "fedftg-64")]


def fitted(part: str, *counted: str) -> tuple[float, float]:
    """CPU seconds of a part of the server for a site and round, and for a byte of all sites' messages.

    No cost is negative (non-negative least squares); a run's start is a third unknown.
    """
    runs = measured()
    costs = [[1.0, ROUNDS * row["sites"], ROUNDS * 1e6 * sum(row[key] for key in counted)] for row in runs]
    (_, site, byte), _ = nnls(np.array(costs), np.array([row[f"{part} CPU s"] for row in runs]))
    return float(site), float(byte)


def constants() -> Constants:
    """The constants, from the recorded measurements."""
    rows = {row["sites"]: row for row in measured() if row["strategy"] == "fedftg"}
    few, many = rows[16], rows[256]
    memory = (many["SuperLink MB"] - few["SuperLink MB"]) / (many["up MB"] - few["up MB"])
    llama = [r for r in _rows("averaging") if (r["model"], r["subspace"], r["sites"]) == ("Llama-2-7B", "own", 50)]
    rate = 2 * 50 * 16 * 11008 * 4096 / (1e-3 * llama[-1]["ms"])
    return Constants(*fitted("SuperLink", "up MB", "down MB"), *fitted("ServerApp", "up MB"), memory, rate)


def ways(sites: int) -> dict[str, Way]:
    """The strategies at an 8B model, each with what is usually trained with it; so many sites take part in a round."""
    third = {shape: THIRD * count for shape, count in MLP.items()}
    linear = {shape: BLOCKS * count for shape, count in (MLP | ATTENTION).items()}
    size = sum(rows * cols * count for (rows, cols), count in third.items())

    def factors(rank: int, exchange: Exchange | None = None) -> float:
        return sum(count * weight_bytes(shape, rank, exchange or Exchange()) for shape, count in third.items())

    def lora(rank: int) -> float:
        return 4.0 * rank * sum(count * sum(shape) for shape, count in linear.items())

    dense = sum(count * weight_bytes(shape, None, Exchange()) for shape, count in third.items())
    own, shared = 2.0 * sites * 16 * size, Exchange(basis=SharedBasis(0, 1, 16))
    whole = 2.0 * 16 * sum(count * rows * cols for (rows, cols), count in linear.items())
    return {
        "FedFTG dense, as published": Way(dense, dense, sites * size),
        "FedFTG, own bases": Way(factors(16), factors(16 * sites), own),
        "FedFTG, own bases, `downlink_rank: 64`": Way(factors(16), factors(64), own),
        "FedFTG, shared basis": Way(factors(16, shared), factors(16, shared), 0.0),
        "FedIT (LoRA), rank 8": Way(lora(8), lora(8), 0.0),
        "FedIT (LoRA), rank 16": Way(lora(16), lora(16), 0.0),
        "FlexLoRA, rank 16": Way(lora(16), lora(16), sites * whole),
    }


def cost(way: Way, sites: int, known: Constants) -> dict[str, float]:
    """Seconds of a round beside training, and bytes of memory; what goes down is the same for all, and encoded once."""
    products = way.products / (known.rate * CORES)
    return {
        "link": sites * max(way.up, way.down) / LINK,
        "SuperLink": sites * (known.link + known.link_byte * (way.up + way.down)),
        "ServerApp": sites * (known.app + known.app_byte * way.up) + known.app_byte * way.down + products,
        "memory": known.memory * sites * way.up + way.down,
    }


def wall(costs: Mapping[str, float]) -> str:
    """The first limit that a round meets."""
    return "memory" if costs["memory"] > MEMORY else max(SECONDS, key=lambda name: costs[name])


def run() -> Table:
    """A round of all sites, by strategy."""
    known = constants()
    rows: list[dict[str, Cell]] = []
    for name, way in ways(SITES).items():
        costs = cost(way, SITES, known)
        row: dict[str, Cell] = {"strategy": name, "MB up": way.up / 1e6, "MB down": way.down / 1e6}
        row |= {f"{part}, s": costs[part] for part in SECONDS}
        rows.append(row | {"SuperLink, GB": costs["memory"] / 1e9, "first wall": wall(costs)})
    title = f"{SITES:,} sites of an 8B model: a round beside training, computed"
    return Table(title, rows, [f"{name}: {value}" for name, value in facts().items()])


def levers() -> Table:
    """Ways to move the wall: fewer sites in a round, or sites that reach the server in groups."""
    known = constants()
    rows: list[dict[str, Cell]] = []
    for name in ("FedFTG, own bases", "FedFTG, shared basis", "FedIT (LoRA), rank 16"):
        for what, sites in ((f"all {SITES:,}", SITES), ("a tenth, or buffered by 100", SITES // 10), ("32 groups", 32)):
            costs = cost(ways(sites)[name], sites, known)
            row: dict[str, Cell] = {"strategy": name, "messages a round": what}
            row |= {"largest, s": max(costs[part] for part in SECONDS), "SuperLink, GB": costs["memory"] / 1e9}
            rows.append(row | {"first wall": wall(costs)})
    return Table("The same with fewer messages a round", rows, [])


def text(table: Table) -> str:
    """A table as Markdown."""
    heads = list(table.rows[0])
    lines = [
        "| " + " | ".join(heads) + " |",
        "|" + "|".join("---" if n == 0 else "---:" for n in range(len(heads))) + "|",
    ]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in table.rows]
    return "\n".join(lines)


def facts() -> dict[str, str]:
    """The constants in words, by what docs/scale.md calls them."""
    known = constants()
    return {
        "CPU of the SuperLink, a site and round": f"{1e3 * known.link:.0f} ms",
        "CPU of the SuperLink, a MB that a site sends or receives": f"{1e9 * known.link_byte:.1f} ms",
        "CPU of the ServerApp, a site and round": f"{1e3 * known.app:.0f} ms",
        "CPU of the ServerApp, a MB that a site sends": f"{1e9 * known.app_byte:.1f} ms",
        "memory of the SuperLink, a MB of open replies": f"{known.memory:.2f} MB",
        "averaging of factors, a thread": f"{known.rate / 1e9:.0f} GFLOP/s",
    }


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return str(value)


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def tables() -> list[str]:
    """The page's tables as Markdown."""
    lines = ["| constant | value |", "|---|---:|", *(f"| {name} | {value} |" for name, value in facts().items())]
    return ["\n".join(lines), text(run()), text(levers())]


def main() -> None:
    """Write the tables into the page, each in the place of the one with the same first column heads."""
    blocks = PAGE.read_text(encoding="utf-8").split("\n\n")
    for table in tables():
        heads = table.split("|")[1:3]
        (place,) = (number for number, block in enumerate(blocks) if block.split("|")[1:3] == heads)
        blocks[place] = table
    PAGE.write_text("\n\n".join(blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
