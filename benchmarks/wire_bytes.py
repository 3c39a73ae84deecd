"""FedFTG's bytes per round, up and down, in factors against dense tensors, at the shapes of real models' MLPs."""

import torch

from benchmarks.table import Cell, Table
from common.linalg.subspace import SharedBasis
from common.protocol import wire
from common.protocol.factors import Exchange, Factors, pack

# Trained: the three MLP matrices of the lower third of the blocks, (rows, columns) and how many of them.
MODELS: dict[str, dict[tuple[int, int], int]] = {
    "TinyLlama-1.1B": {(5632, 2048): 14, (2048, 5632): 7},
    "Gemma-2B": {(16384, 2048): 12, (2048, 16384): 6},
    "Llama-2-7B": {(11008, 4096): 20, (4096, 11008): 10},
}
RANKS, REFRESHES, SITES = (8, 16, 32, 64, 128, 256), (1, 2, 5), (3, 10, 50)


def run() -> Table:
    """Every model, rank, number of refreshes and of sites; own and shared bases."""
    rows: list[dict[str, Cell]] = []
    for model, shapes in MODELS.items():
        dense = sum(count * weight_bytes(shape, None, Exchange()) for shape, count in shapes.items())
        for rank in RANKS:
            for subspace, refreshes in (*(("own", j) for j in REFRESHES), ("shared", 1)):
                shared = Exchange(basis=SharedBasis(0, 1, rank)) if subspace == "shared" else Exchange()
                up = sum(count * weight_bytes(shape, rank * refreshes, shared) for shape, count in shapes.items())
                row: dict[str, Cell] = {"model": model, "rank": rank, "subspace": subspace, "refreshes": refreshes}
                row |= {"dense MB": dense / 1e6, "up MB": up / 1e6, "times fewer up": dense / up}
                for sites in SITES:
                    columns = rank * (refreshes * sites if subspace == "own" else 1)
                    down = sum(count * weight_bytes(shape, columns, shared) for shape, count in shapes.items())
                    row[f"down, {sites} sites"] = dense / down
                rows.append(row)
    return Table(
        "FedFTG: bytes of a round in factors against dense tensors",
        rows,
        [
            "Per site and round, float32, MLPs of the lower third; ratios: dense / ours. Encoded as they travel;",
            "where factors are not smaller the dense tensor travels, so no ratio is below 1.",
        ],
    )


def weight_bytes(shape: tuple[int, int], columns: int | None, exchange: Exchange) -> int:
    """Bytes on the wire of a weight that changed by so many columns; None: dense."""
    rows, cols = shape
    if columns is None or columns * (max(shape) if exchange.basis is not None else sum(shape)) >= rows * cols:
        return wire.num_bytes(wire.encode({"w": torch.empty(shape)}))
    left, right = torch.empty(rows, columns), torch.empty(columns, cols)
    factors = Factors(1.0, [(left, right)], common=exchange.basis is not None)
    return wire.num_bytes(wire.encode(pack("w", factors, torch.empty(shape, device="meta"), exchange)))
