"""Held-out loss after equal rounds: own and shared bases against dense AdamW, each with its best learning rate.

The demo's three sites, each training SmolLM2 on its own rows; direct averaging. One process plays all sites, through
the code that sites and server run.
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Cell, Table
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.protocol.factors import unpack
from deploy.demo.prepare import DEFAULT_CACHE, prepare
from strategies.fedftg import FedFTGRule
from strategies.flower.named import make_rule
from strategies.flower.versions import Versions
from strategies.rule import Update

DEMO = Path(__file__).parents[1] / "deploy" / "demo" / "federation.yaml"
ROUNDS = 3
METHODS: dict[str, tuple[dict[str, object], tuple[float, ...]]] = {
    "own": ({}, (8e-3, 1.6e-2, 3.2e-2)),
    "shared": ({"subspace": "shared"}, (3.2e-2, 6.4e-2, 1.28e-1)),
    "shared, moments averaged": (
        {"subspace": "shared", "optimizer_state": "averaged"},
        (3.2e-2, 6.4e-2, 1.28e-1),
    ),
    "dense AdamW": ({}, (3e-4, 1e-3, 3e-3)),
}


class Dense(Session):
    """A site that trains the same weights with plain AdamW."""

    def _optimizer(self, parameters: dict[str, torch.nn.Parameter], server_round: int) -> torch.optim.Optimizer:
        del server_round
        return torch.optim.AdamW(parameters.values(), lr=self.federation.training.learning_rate, weight_decay=0.0)


def run() -> Table:
    """Every method at every learning rate."""
    prepare(DEFAULT_CACHE)
    rows: list[dict[str, Cell]] = []
    for method, (strategy, rates) in METHODS.items():
        tried = []
        for rate in rates:
            losses = federate(Dense if method == "dense AdamW" else Session, strategy, rate)
            tried.append((losses[-1], rate, losses[0]))
            print(method, rate, losses, flush=True)
        for loss, rate, before in sorted(tried):
            rows.append({"method": method, "learning rate": rate, "before": before, f"loss after {ROUNDS}": loss})
    best = {method: min(float(r[f"loss after {ROUNDS}"]) for r in rows if r["method"] == method) for method in METHODS}  # type: ignore[arg-type]
    for row in rows:
        row["less best dense"] = float(row[f"loss after {ROUNDS}"]) - best["dense AdamW"]  # type: ignore[arg-type]
    return Table(
        "Held-out loss on the demo after equal rounds: bases of its own, shared bases, dense AdamW",
        rows,
        [
            f"SmolLM2-135M, MLPs of the lower third, rank 16, 3 sites, {ROUNDS} rounds of 5 steps of 8 rows; the",
            "mean of the sites' held-out losses (32 rows each), weighted by training rows. One seed; best rate first.",
        ],
    )


def federate(kind: type[Session], strategy: dict[str, object], rate: float) -> list[float]:
    """Mean held-out loss before the first round and after the last."""
    config = settings(strategy, rate)
    sessions = [kind(load(Path(file), SiteConfig), Path(file), config) for file in config.local.sites]  # type: ignore[union-attr]
    rule = make_rule(config.strategy, seed=config.training.seed)
    assert isinstance(rule, FedFTGRule)
    first = sessions[0].weights
    assert first is not None
    versions = Versions(first.tensors)
    losses = []
    for number in range(1, ROUNDS + 2):
        updates, measured = [], []
        for session in sessions:
            weights = session.weights
            assert weights is not None
            steps = versions.since(weights.version)
            if steps is None:
                session.set_state(versions.state, None, [], versions.latest)
            else:
                session.follow(steps, weights.version, versions.latest)
            if number in (1, ROUNDS + 1):
                measured.append((len(session._rows[0]), session.evaluate()["loss"]))
            if number <= ROUNDS:
                sent, _ = session.train(number, list(versions.state))
                shapes = {name: tuple(tensor.shape) for name, tensor in versions.state.items()}
                whole, factors = unpack(sent, shapes, rule.exchange(number))
                updates.append(Update(session.site.name, session.train_rows, whole, None, factors))
        if measured:
            losses.append(sum(n * loss for n, loss in measured) / sum(n for n, _ in measured))
        if updates:
            versions.advance(rule.aggregate(number, versions.state, iter(updates)))
    return losses


def settings(strategy: dict[str, object], rate: float) -> FederationConfig:
    """The demo's federation with these changes."""
    config: dict[str, Any] = resolved(load(DEMO, FederationConfig), DEMO).model_dump(mode="json")
    config["strategy"] = {"name": "fedftg", "modules": "mlp", "blocks": "lower third", "rank": 16, **strategy}
    config["rounds"] = ROUNDS
    config["training"]["learning_rate"] = rate
    config["evaluation"] |= {"max_examples": 32, "generate": 0}
    return FederationConfig.model_validate(config)
