"""The server's average of updates in factors against Flower's average of dense updates: errors and times."""

import time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from benchmarks.table import Cell, Table
from common.linalg.subspace import SharedBasis
from common.protocol.factors import Factors
from strategies.fedftg import FedFTGRule
from strategies.rule import Update

NAME, RANK = "model.layers.0.mlp.up_proj.weight", 16
SHAPES = {"TinyLlama": (5632, 2048), "SmolLM2-135M": (1536, 576)}


def run() -> Table:
    """Own bases with one and two refreshes, a shared basis; 3, 10 and 50 sites."""
    rows: list[dict[str, Cell]] = []
    for model, shape in SHAPES.items():
        for subspace, refreshes in (("own", 1), ("own", 2), ("shared", 1)):
            for sites in (3, 10, 50):
                rows.append(_measure(model, shape, subspace, refreshes, sites))
    return Table(
        "One weight averaged over all sites: factors (ours) against dense tensors (Flower's FedAvg)",
        rows,
        [
            "error: |average - float64 average|_F / |float64 average|_F, and relative to the round's change, which",
            "is some thousandth of the weight and loses its last bits in any float32 weight. Decay 1 - 1e-4.",
            "ms: from the decoded updates to the next state; ours also computes how far the sites drift apart.",
        ],
    )


def _measure(model: str, shape: tuple[int, int], subspace: str, refreshes: int, sites: int) -> dict[str, Cell]:
    g = torch.Generator().manual_seed(sites)
    start = 0.02 * torch.randn(shape, generator=g)
    basis = SharedBasis(0, 1, RANK)(NAME, shape) if subspace == "shared" else None
    updates, dense, total = [], [], sites * (sites + 1) // 2
    exact = torch.zeros(shape, dtype=torch.float64)
    for site in range(1, sites + 1):
        terms = []
        for _ in range(refreshes):
            p = basis if basis is not None else torch.linalg.qr(torch.randn(shape[1], RANK, generator=g)).Q.T
            terms.append((1e-3 * torch.randn(shape[0], RANK, generator=g), p))
        factors = Factors(1 - 1e-4, terms, common=basis is not None)
        updates.append(Update(f"site-{site}", site, {}, None, {NAME: factors}))
        whole: Tensor = factors.decay * start.double()
        for left, right in terms:
            whole += left.double() @ right.double()
        exact += site / total * whole
        arrays = ArrayRecord({NAME: Array(whole.float().numpy())})
        dense.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": site})}))
    moved = float((exact - start.double()).norm())
    rule = FedFTGRule(shared=(0, RANK) if subspace == "shared" else None)
    began = time.perf_counter()
    ours = rule.aggregate(1, {NAME: start}, iter(updates)).state[NAME]
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    theirs = aggregate_arrayrecords(dense, "num-examples")[NAME].numpy()
    peer = time.perf_counter() - began
    row: dict[str, Cell] = {"model": model, "subspace": subspace, "refreshes": refreshes, "sites": sites}
    lost, lost_by_peer = float((ours.double() - exact).norm()), float(np.linalg.norm(theirs - exact.numpy()))
    row |= {"error": lost / float(exact.norm()), "FedAvg's": lost_by_peer / float(exact.norm())}
    row |= {"of the change": lost / moved, "FedAvg's of it": lost_by_peer / moved}
    return row | {"ms": 1e3 * seconds, "FedAvg's ms": 1e3 * peer, "times faster": peer / seconds}
