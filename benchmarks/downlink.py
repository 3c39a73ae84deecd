"""A way down of bounded rank (decision 039): its bytes, the server's time, and its effect on the loss."""

import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.experiments.plateau.prepare import CHAPTERS, DEFAULT_CACHE, prepare
from benchmarks.table import Cell, Table
from client.session import Session
from client.site_model import Bases
from common.config.federation import FederationConfig
from common.config.load import load
from common.config.site import SiteConfig
from common.protocol import wire
from common.protocol.factors import Factors, unpack
from server.loop.server_model import ServerModel
from strategies.flower.named import make_strategy
from strategies.rule import Tensors, Update

RANK, ROUNDS = 16, 4  # first part: the demo's rank; the last round is measured
LONG, SEEDS, RATE = 15, (0, 1), 1.6e-2  # second part
SITES = {20: (None, 4, 8, 16), 50: (None, 4, 8, 16)}  # r = 4 and J = 2: q is r, r J, 2 r J
Rank = int | Literal["auto"] | None


def run() -> Table:
    """The demo's shapes with random updates, then a small decoder that is trained to tell a title's chapter."""
    rows = [_measure(sites, rank) for sites in (3, 20, 50) for rank in (None, "auto", 2 * RANK)]
    prepare(DEFAULT_CACHE)
    for sites, ranks in SITES.items():
        rows += [_trained(sites, rank) for rank in ranks]
    return Table(
        "FedFTG with own bases: `downlink_rank` against the whole mean change",
        rows,
        [
            f"demo: 30 weights of SmolLM2-135M's lower third, random updates of rank {RANK}, round {ROUNDS}. down: for",
            "a site that took part in the last round; ms: CPU of one thread for the round's aggregation. titles: a",
            "decoder of 0.3 M parameters, ten chapters of ICD-10-CM, Dirichlet 0.3 (20 sites: the first of the 50),",
            f"rank 4, {LONG} rounds of 4 steps of 4 rows, a new basis every 2 steps, Adam with {RATE:g}. loss and",
            "accuracy: on titles of other categories, mean of the seeds, and half their distance. waiting: |E|",
            "relative to the round's change. The last round sends all that waits; before: the loss of T without that.",
        ],
    )


def _measure(sites: int, rank: Rank) -> dict[str, Cell]:
    config = {"name": "fedftg", "rank": RANK, "downlink_rank": rank}
    strategy = make_strategy(_federation(config, 1, 0).strategy, seed=0)
    shapes = [(1536, 576), (1536, 576), (576, 1536)] * 10
    g = torch.Generator().manual_seed(0)
    state = {f"model.layers.{k // 3}.mlp.{k}.weight": 0.02 * torch.randn(s, generator=g) for k, s in enumerate(shapes)}
    strategy.begin(state)
    down, milliseconds, diagnostics = 0, 0.0, {}
    for number in range(1, ROUNDS + 1):
        updates = [_random(site, state, g) for site in range(sites)]
        began = time.thread_time()
        outcome = strategy.combine(number, state, iter(updates))
        milliseconds = 1e3 * (time.thread_time() - began)
        state, diagnostics = outcome.state, outcome.diagnostics
        assert outcome.step is not None
        down = wire.num_bytes(wire.encode(outcome.step.tensors, bundled=True))
    row: dict[str, Cell] = {"of": "demo", "sites": sites, "downlink_rank": "all" if rank is None else str(rank)}
    row |= {"down MB": down / 1e6, "ms": milliseconds, "waiting": _waiting(diagnostics)}
    return row | {"seeds": None, "before": None, "loss": None, "+-": None, "accuracy": None}


def _random(site: int, state: Tensors, g: torch.Generator) -> Update:
    factors = {}
    for name, weight in state.items():
        m, n = weight.shape
        basis = torch.linalg.qr(torch.randn(min(m, n), RANK, generator=g)).Q
        other = 1e-3 * torch.randn(max(m, n), RANK, generator=g)
        factors[name] = Factors(1.0, [(other, basis.T) if m >= n else (basis, other.T)])
    return Update(f"site-{site}", 1 + site % 7, {}, None, factors)


def _waiting(diagnostics: Mapping[str, float]) -> float | None:
    found = [value for name, value in diagnostics.items() if name.startswith("waiting/")]
    return statistics.fmean(found) if found else None


def _trained(sites: int, rank: Rank) -> dict[str, Cell]:
    row = _mean(sites, rank, [_train(sites, rank, seed) for seed in SEEDS])
    print(row, flush=True)
    return row


def _mean(sites: int, rank: Rank, runs: list[dict[str, float]]) -> dict[str, Cell]:
    losses = [run["loss"] for run in runs]
    row: dict[str, Cell] = {"of": "titles", "sites": sites, "downlink_rank": "all" if rank is None else str(rank)}
    row |= {"down MB": statistics.fmean(run["down"] for run in runs) / 1e6, "ms": None}
    row |= {"waiting": statistics.fmean(run["waiting"] for run in runs) if rank is not None else None}
    row |= {"seeds": len(runs), "before": statistics.fmean(run["before"] for run in runs)}
    row |= {"loss": statistics.fmean(losses), "+-": (max(losses) - min(losses)) / 2}
    return row | {"accuracy": statistics.fmean(run["accuracy"] for run in runs)}


def _train(sites: int, rank: Rank, seed: int) -> dict[str, float]:
    """One federation in this process, through the code that sites and server run."""
    section = {"name": "fedftg", "modules": "mlp", "blocks": "lower half", "head": "train", "rank": 4}
    section |= {"update_proj_gap": 2, "scale": 1.0, "downlink_rank": rank}
    config, folder = _federation(section, LONG, seed), DEFAULT_CACHE / "titles" / "50-0.3"
    files, bases = [folder / f"site-{k:02}.yaml" for k in range(1, sites + 1)], Bases()
    sessions = [Session(load(file, SiteConfig), file, config, bases) for file in files]
    server = ServerModel(config, Path("downlink"))
    strategy = make_strategy(config.strategy, seed=seed)
    state = server.initial_state()
    strategy.begin(state)
    versions = strategy.versions
    assert versions is not None
    down, told, start = [], {}, state
    for number in range(1, LONG + 1):

        def updates(number: int = number, state: Tensors = state) -> Iterator[Update]:
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            for session in sessions:
                weights = session.weights
                assert weights is not None
                steps = versions.since(weights.version)
                if steps is None:
                    session.set_state(state, None, [], versions.latest, number - 1)
                else:
                    session.follow(steps, weights.version, versions.latest)
                sent, _ = session.train(number, list(state))
                whole, factors = unpack(sent, shapes, strategy.rule.exchange(number))
                yield Update(session.site.name, session.train_rows, whole, None, factors)

        outcome = strategy.combine(number, state, updates())
        assert outcome.step is not None
        start, state, told = state, outcome.state, outcome.diagnostics
        down.append(wire.num_bytes(wire.encode(outcome.step.tensors, bundled=True)))
    before, scores = server.evaluate(state), server.evaluate(strategy.settle(start, state))
    return {
        "down": statistics.fmean(down),
        "waiting": _waiting(told) or 0.0,
        "before": before["loss"],
        "loss": scores["loss"],
        "accuracy": scores["accuracy"],
    }


def _federation(strategy: dict[str, Any], rounds: int, seed: int) -> FederationConfig:
    cache = DEFAULT_CACHE
    rows = {"path": str(cache / "titles" / "validation.jsonl"), "prompt": "title", "answer": "chapter"}
    return FederationConfig.model_validate(
        {
            "name": "downlink",
            "model": {"path": str(cache / "decoder")},
            "task": {"type": "sequence-classification", "labels": list(CHAPTERS.values())},
            "strategy": {"head": "freeze"} | strategy,
            "rounds": rounds,
            "training": {"batch_size": 4, "max_length": 24, "local_steps": 4, "learning_rate": RATE, "seed": seed},
            "evaluation": {"max_examples": 800, "batch_size": 100, "server": rows},
        }
    )
