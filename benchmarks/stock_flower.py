"""Whole rounds of the demo's federation against the same federation on stock Flower: time, fixed cost, bytes.

The peer is ``benchmarks/stock_app``: FedAvg of dense tensors, galore-torch's optimizer, Flower's process per message.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.table import Cell, Table
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from deploy.demo.prepare import DEFAULT_CACHE, prepare
from deploy.sandbox.flower import Flower
from server.run.folder import read_lines

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "deploy" / "demo" / "federation.yaml"
ROUNDS, WARM_UP = 4, 1  # the first round, in which a worker loads its model, is left out


def run() -> Table:
    """One and three sites; ours with workers, ours with Flower's processes, and the peer."""
    prepare(DEFAULT_CACHE)
    rows: list[dict[str, Cell]] = []
    for sites in (1, 3):
        with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
            folder = Path(temporary)
            file = federation(folder, sites, {})
            peer = stock(folder, file, sites)
            variants = {
                "ours": ours(folder, file, "warm"),
                "ours, shared": ours(folder, federation(folder, sites, {"subspace": "shared"}), "shared"),
                "ours, a process per message": ours(folder, federation(folder, sites, {}, warm=False), "cold"),
                "stock Flower": peer,
            }
        for name, one in variants.items():
            row: dict[str, Cell] = {"federation": name, "sites": sites}
            row |= {"s per round": one["round"], "fixed s": one["fixed"], "train s": one["train"]}
            row |= {"MB down": one["down"] / 1e6, "MB up": one["up"] / 1e6}
            row |= {
                "stock / it, fixed": peer["fixed"] / one["fixed"],
                "stock / it, round": peer["round"] / one["round"],
            }
            rows.append(row)
    return Table(
        "Rounds of the demo (SmolLM2-135M, 5 local steps) against stock Flower with dense tensors",
        rows,
        [
            f"Mean of rounds {WARM_UP + 1} to {ROUNDS}, without evaluation; all processes on one machine, over gRPC.",
            "train s: local training of the slowest site. fixed s: the rest of the round. Bytes per site and round.",
        ],
    )


def federation(folder: Path, sites: int, strategy: dict[str, object], *, warm: bool = True) -> Path:
    """The demo's federation file with fewer sites and next to no evaluation."""
    config = resolved(load(DEMO, FederationConfig), DEMO).model_dump(mode="json")
    config["strategy"] = {"name": "fedftg", "modules": "mlp", "blocks": "lower third", "rank": 16, **strategy}
    config["rounds"] = ROUNDS
    config["cohort"]["min_clients"] = sites
    config["evaluation"] |= {"every": 99, "max_examples": 1, "generate": 0, "samples": 0, "server": None}
    config["local"] |= {"sites": config["local"]["sites"][:sites], "warm": warm}
    file = folder / f"federation-{sites}-{warm}-{'-'.join(map(str, strategy.values()))}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def ours(folder: Path, file: Path, name: str) -> dict[str, float]:
    """Measurements of a run through the launcher."""
    command = [sys.executable, "-m", "deploy", "run", str(file), "--runs", str(folder), "--name", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    events, metrics = (read_lines(folder / name / f"{what}.jsonl") for what in ("events", "metrics"))
    trained = [r for r in metrics if r["phase"] == "train"]
    rounds = []
    for event in events:
        if event["event"] == "round_finished":
            mine = [r for r in trained if r["round"] == event["round"]]
            seconds = {"seconds": event["seconds"], "train": max(r["seconds"]["train"] for r in mine)}
            rounds.append(seconds | {key: sum(r["bytes"][key] for r in mine) / len(mine) for key in ("down", "up")})
    return _means(rounds)


def stock(folder: Path, file: Path, sites: int) -> dict[str, float]:
    """Measurements of the peer."""
    out = folder / "stock.json"
    threads = max(1, (os.cpu_count() or 1) // sites)
    with Flower(folder / "stock", threads=threads) as flower:
        for number, site in enumerate(load(file, FederationConfig).local.sites):  # type: ignore[union-attr]
            flower.start_node(f"site-{number}", f'site="{site}"')
        flower.submit(ROOT / "benchmarks" / "stock_app", {"federation": str(file), "rounds": ROUNDS, "out": str(out)})
        flower.wait(3600)
    measured: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return _means([{**r, "down": measured["down"]} for r in measured["rounds"]])


def _means(rounds: list[dict[str, float]]) -> dict[str, float]:
    kept = rounds[WARM_UP:]
    mean = {key: sum(r[key] for r in kept) / len(kept) for key in kept[0]}
    return mean | {"round": mean["seconds"], "fixed": mean["seconds"] - mean["train"]}
