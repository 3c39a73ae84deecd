"""The server's average of updates in factors against Flower's average of dense updates: errors and times."""

import math
import time
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.table import Cell, Table
from common.linalg.subspace import SharedBasis, projects_right
from common.protocol.factors import Factors
from strategies.admission.bounds import change_norms
from strategies.combine.weighted_mean import WeightedMean
from strategies.fedftg import FedFTGRule
from strategies.rule import Update

NAME, RANK = "model.layers.0.mlp.up_proj.weight", 16
SHAPES = {"TinyLlama": (5632, 2048), "SmolLM2-135M": (1536, 576), "Llama-2-7B": (4096, 11008)}
WAYS = (("own", 1, 1e-4), ("own", 1, 0.0), ("shared", 1, 1e-4))  # refreshes, decay
REPEATS = 2  # the faster counts: other work on the machine only adds; once for the largest
_MOST = 2**30  # bytes that the dense weights of all sites may take together


def run() -> Table:
    """Own bases with weight decay and without; a shared basis; 10, 50 and 200 sites."""
    rows: list[dict[str, Cell]] = []
    for model, shape in SHAPES.items():
        ways = WAYS if model != "Llama-2-7B" else WAYS[:1]
        for (subspace, refreshes, decay), sites in product(ways, (10, 50, 200)):
            rows.append(_measure(model, shape, subspace, refreshes, decay, sites))
            print(rows[-1], flush=True)
    return Table(
        "One weight averaged over all sites: factors (ours) against dense tensors (Flower's FedAvg)",
        rows,
        [
            "error: |average - float64 average|_F / |float64 average|_F, and relative to the round's change, which",
            "is some thousandth of the weight and loses its last bits in any float32 weight. Decay: 1 - c of a round.",
            f"ms: CPU time of one thread from admitted updates to the next state, the better of {REPEATS} (of 1 where",
            "all weights are 4 GB and more), in turns; alone: without the diagnostics, which FedAvg does not compute.",
            "Admission has computed the updates' norms, for its bounds.",
            "FedAvg has at most 1 GiB of different dense weights here: with more sites it reads some of them again.",
        ],
    )


def _measure(
    model: str, shape: tuple[int, int], subspace: str, refreshes: int, decay: float, sites: int
) -> dict[str, Cell]:
    g = torch.Generator().manual_seed(sites)
    start = 0.02 * torch.randn(shape, generator=g)
    basis = SharedBasis(0, 1, RANK)(NAME, shape) if subspace == "shared" else None
    updates, dense, total = [], [], sites * (sites + 1) // 2
    held = min(sites, _MOST // (4 * start.numel()))  # different dense weights in memory
    exact = torch.zeros(shape, dtype=torch.float64)
    for site in range(1, sites + 1):
        terms = []
        for _ in range(refreshes):
            across = 1e-3 * torch.randn(max(shape), RANK, generator=g)
            p = basis if basis is not None else torch.linalg.qr(torch.randn(min(shape), RANK, generator=g)).Q
            if projects_right(shape):
                terms.append((across, p if basis is not None else p.T))
            else:
                terms.append((p, across.T))
        factors = Factors(1 - decay, terms, common=basis is not None)
        update = Update(f"site-{site}", site, {}, None, {NAME: factors})
        updates.append(replace(update, norms=change_norms(update, {NAME: start})))
        exact += site / total * (factors.decay - 1) * start.double()
        for left, right in terms:
            exact.addmm_(left.double(), right.double(), alpha=site / total)
        if site <= held:
            dense.append(ArrayRecord({NAME: Array(factors.apply(start).numpy())}))
    moved = float(exact.norm())
    exact += start.double()
    rule = FedFTGRule(shared=(0, RANK) if subspace == "shared" else None)
    replies = [
        RecordDict({"arrays": dense[k % held], "metrics": MetricRecord({"num-examples": k + 1})}) for k in range(sites)
    ]
    seconds = alone = peer = math.inf
    for _ in range(REPEATS if sites * start.numel() < 10**9 else 1):
        began = time.thread_time()
        ours = rule.aggregate(1, {NAME: start.clone()}, iter(updates)).state[NAME]
        seconds = min(seconds, time.thread_time() - began)
        began = time.thread_time()
        mean = WeightedMean(state := {NAME: start.clone()})
        for update in updates:
            mean.fold(update.factors, update.num_examples)
        rule.finalize(1, state, mean.means(), {})
        alone = min(alone, time.thread_time() - began)
        began = time.thread_time()
        theirs = aggregate_arrayrecords(replies, "num-examples")[NAME].numpy()
        peer = min(peer, time.thread_time() - began)
    row: dict[str, Cell] = {"model": model, "subspace": subspace, "refreshes": refreshes, "sites": sites}
    row |= {"decay": decay, "error": float((ours.double() - exact).norm() / exact.norm())}
    row["of the change"] = float((ours.double() - exact).norm()) / moved
    if held == sites:  # else FedAvg has averaged other weights
        lost = float(np.linalg.norm(theirs - exact.numpy()))
        row |= {"FedAvg's": lost / float(exact.norm()), "FedAvg's of it": lost / moved}
    else:
        row |= {"FedAvg's": None, "FedAvg's of it": None}
    row |= {"ms": 1e3 * seconds, "alone": 1e3 * alone}
    return row | {"FedAvg's ms": 1e3 * peer, "times faster": peer / seconds}
