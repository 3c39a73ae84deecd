"""One refresh of GaLore's basis: our range finder against galore-torch's full SVD, and the energy each captures."""

import time
from collections.abc import Callable

import torch
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor

from benchmarks.table import Cell, Table
from common.linalg.range_finder import range_finder

SHAPES = {  # shapes of MLP weights
    "SmolLM2-135M": (1536, 576),
    "TinyLlama": (5632, 2048),
    "Gemma-2B": (16384, 2048),
    "Llama-2-7B": (11008, 4096),
}
RANKS = (16, 128)


def run() -> Table:
    """Every shape, rank and spectrum; a cold refresh, and one that starts from the basis of a similar gradient."""
    rows: list[dict[str, Cell]] = []
    for model, (m, n) in SHAPES.items():
        for spectrum in ("1/i", "flat"):
            gradient, earlier = gradients(m, n, spectrum)
            projector = GaLoreProjector(max(RANKS))
            exact, peer = timed(lambda p=projector, g=gradient: p.get_orthogonal_matrix(g, max(RANKS), type="right"), 1)  # type: ignore[misc]
            for rank in RANKS:
                cold, seconds = timed(lambda g=gradient, r=rank: range_finder(g, r, None, generator()))  # type: ignore[misc]
                start = range_finder(earlier, rank, None, generator())
                warm, seconds_warm = timed(lambda g=gradient, r=rank, w=start: range_finder(g, r, w, generator()))  # type: ignore[misc]
                most = energy(gradient, exact[:rank].T)
                row: dict[str, Cell] = {"model": model, "weight": f"{m}x{n}", "spectrum": spectrum, "rank": rank}
                row |= {"ms": 1e3 * seconds, "warm ms": 1e3 * seconds_warm, "galore-torch ms": 1e3 * peer}
                row |= {"times faster": peer / seconds, "warm": peer / seconds_warm}
                row |= {"energy": energy(gradient, cold) / most, "warm energy": energy(gradient, warm) / most}
                rows.append(row)
    return Table(
        "GaLore: one refresh of the basis against galore-torch's full SVD",
        rows,
        ["energy: |G P P^T|^2 against the exact SVD's. warm: started from the basis of a gradient a tenth away."],
    )


def gradients(m: int, n: int, spectrum: str) -> tuple[Tensor, Tensor]:
    """A gradient (m, n) with this spectrum, and one near it."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(m, n, generator=g)
    if spectrum == "1/i":
        noise = noise / torch.arange(1, n + 1) @ torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    return noise, noise + 0.1 * float(noise.std()) * torch.randn(m, n, generator=g)


def energy(gradient: Tensor, basis: Tensor) -> float:
    """Share of the energy of a gradient (m, n) that a basis (n, rank) captures."""
    return float((gradient @ basis).double().square().sum())


def generator() -> torch.Generator:
    """The same random directions for all."""
    return torch.Generator().manual_seed(1)


def timed(work: Callable[[], Tensor], repeats: int = 3) -> tuple[Tensor, float]:
    """Result, and the best time."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - started)
    return result, best
