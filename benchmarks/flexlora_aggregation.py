"""FlexLoRA's aggregation of one layer, against the paper's released code: the dense sum and torch.linalg.svd."""

import ctypes
import gc
import itertools
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from benchmarks.table import Cell, Table
from common.linalg.lowrank import Term, TruncatedSVD, truncated_svd

T = TypeVar("T")
SHAPES = {"TinyLlama": (5632, 2048), "Gemma-2B": (16384, 2048), "Llama-2-7B": (11008, 4096)}  # out, in of the MLP
CLIENTS = (4, 10, 16, 64)
RANKS = (8, 16, 64)
COMPARED = {(10, 16), (64, 16)}  # clients and ranks at which products and memory are compared
REPEATS = 3


def run() -> Table:
    """Every shape, number of clients and rank; for two kinds of updates."""
    rows: list[dict[str, Cell]] = []
    for model, (out, in_) in SHAPES.items():
        svd = DenseSVD()
        for clients, rank, (kind, make) in itertools.product(CLIENTS, RANKS, KINDS.items()):
            terms = make(clients, rank, out, in_)
            dense, sum_seconds = timed(partial(dense_sum, terms))
            ours, seconds = best_of(partial(truncated_svd, terms, rank))
            row: dict[str, Cell] = {"model": model, "layer": f"{out}x{in_}", "clients": clients, "rank": rank}
            row |= {
                "updates": kind,
                "seconds": seconds,
                "sum": sum_seconds,
                "difference": None,
                "MB": None,
                "peer MB": None,
            }
            if (clients, rank) in COMPARED:
                row["difference"] = svd.difference(dense, ours, rank)
                row["MB"] = peak_of(partial(truncated_svd, terms, rank)) / 1e6
                row["peer MB"] = max(peak_of(partial(dense_sum, terms)), svd.peak + dense.nbytes) / 1e6
            rows.append(row)
            print(".", end="", flush=True)
            del dense, ours, terms
        for row in rows[-len(CLIENTS) * len(RANKS) * len(KINDS) :]:
            peer = float(row.pop("sum") or 0.0) + svd.seconds
            row |= {"peer seconds": peer, "times faster": peer / float(row["seconds"] or 0.0)}
    print()
    return Table(
        "FlexLoRA, server's work for one layer, against the dense sum + torch.linalg.svd",
        rows,
        [
            "updates: `one start`: clients that trained a round from the same factors, as FlexLoRA's do; `unrelated`: "
            "random factors, whose flat spectrum is the worst case.",
            "seconds: best of 3 (of 1 above 2 s), with singular values, energy, ranks and inner products for the "
            "diagnostics. peer: the sum is measured in every row, the SVD is the best time of its shape.",
            "MB: peak of memory above what the factors take, in a run of its own. difference: of the two rank-r "
            "products, relative; on flat spectra the peer's float32 SVD is the less exact of the two.",
        ],
    )


class DenseSVD:
    """The peer's SVD. It is slow, and its cost depends on the shape alone, so only some rows of the table run it."""

    def __init__(self) -> None:
        self.seconds, self.peak = float("inf"), 0

    def difference(self, dense: Tensor, ours: TruncatedSVD, rank: int) -> float:
        """Relative distance of the two best approximations."""
        work = partial(torch.linalg.svd, dense, full_matrices=False)
        (u, s, vt), seconds = timed(work)
        self.seconds = min(self.seconds, seconds)
        self.peak = self.peak or peak_of(work)
        theirs = (u[:, :rank] * s[:rank]) @ vt[:rank]
        return float(torch.linalg.norm((ours.u * ours.s) @ ours.vt - theirs) / torch.linalg.norm(theirs))


def one_start(clients: int, rank: int, out: int, in_: int) -> list[Term]:
    """Every client has moved by a third of B and a tenth of A from the round's start."""
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(out, rank, generator=g), torch.randn(rank, in_, generator=g)
    return [
        Term(
            1 / clients,
            0.02 * (b + 0.3 * torch.randn(out, rank, generator=g)),
            (a + 0.1 * torch.randn(rank, in_, generator=g)) / in_**0.5,
        )
        for _ in range(clients)
    ]


def unrelated(clients: int, rank: int, out: int, in_: int) -> list[Term]:
    """Random factors."""
    g = torch.Generator().manual_seed(0)
    return [
        Term(1 / clients, torch.randn(out, rank, generator=g), torch.randn(rank, in_, generator=g))
        for _ in range(clients)
    ]


KINDS = {"one start": one_start, "unrelated": unrelated}


def dense_sum(terms: list[Term]) -> Tensor:
    """As released code forms it: every client's product, weighted and added."""
    total = torch.zeros(len(terms[0].b), terms[0].a.shape[1])
    for term in terms:
        total += term.weight * (term.b @ term.a)
    return total


def best_of(work: Callable[[], T]) -> tuple[T, float]:
    """Result, and the best time of a few runs, or the time of one run when that takes seconds."""
    runs = [timed(work)]
    while len(runs) < REPEATS and runs[0][1] < 2.0:
        runs.append(timed(work))
    return runs[-1][0], min(seconds for _, seconds in runs)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Result, and seconds."""
    gc.collect()
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of memory at the peak above the start, looked at every 2 ms."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else memory that malloc keeps for reuse would hide the work's use
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    peak = max(peak, process.memory_info().rss)
    done.set()
    watcher.join()
    del result
    return peak - before
