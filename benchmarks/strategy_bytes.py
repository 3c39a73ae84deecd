"""Bytes per round of every strategy, up and down, in real federations of SmolLM2 on the demo's three sites."""

import json
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
from server.run.folder import read_lines

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "deploy" / "demo" / "federation.yaml"
LORA = {"modules": "mlp", "blocks": "lower third", "rank": 16, "lora_alpha": 32.0}
STRATEGIES: dict[str, dict[str, object]] = {
    "fedit": LORA,
    "fedftg": {"modules": "mlp", "blocks": "lower third", "rank": 16},
    "flexlora": LORA,
    "ffa-lora": LORA,
    "rolora": LORA,
}
ROUNDS = 3


def run() -> Table:
    """One short federation per strategy, through the launcher."""
    prepare(DEFAULT_CACHE)
    rows: list[dict[str, Cell]] = []
    for name, settings in STRATEGIES.items():
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
            records = federate(Path(folder), {"name": name, **settings})
        trained = [r for r in records if r["phase"] == "train"]
        for number in range(1, ROUNDS + 1):
            of_round = [r["bytes"] for r in trained if r["round"] == number]
            row: dict[str, Cell] = {"strategy": name, "round": number, "sites": len(of_round)}
            row |= {key: sum(b[key] for b in of_round) // max(len(of_round), 1) for key in ("down", "up")}
            rows.append(row)
    peer = {row["round"]: row for row in rows if row["strategy"] == "fedit"}
    for row in rows:
        for key in ("down", "up"):
            row[f"{key} / fedit's"] = float(row[key]) / float(peer[row["round"]][key])  # type: ignore[arg-type]
    return Table(
        "Bytes of tensors per site and round against FedIT (plain LoRA)",
        rows,
        [
            "SmolLM2-135M, MLPs of the lower third, rank 16, float32 on the wire; from the records of real federations "
            "over gRPC with three sites."
        ],
    )


def federate(folder: Path, strategy: dict[str, object]) -> list[dict[str, Any]]:
    """The metrics records of one run.

    Raises:
        RuntimeError: the run failed; with its output.
    """
    config = resolved(load(DEMO, FederationConfig), DEMO).model_dump(mode="json")
    rate = 2.0e-3 if strategy["name"] == "ffa-lora" else 2.0e-4  # FFA-LoRA wants ten times LoRA's (arXiv 2403.12313)
    training = {**config["training"], "learning_rate": rate, "local_steps": 2, "batch_size": 4}
    evaluation = {**config["evaluation"], "every": ROUNDS, "max_examples": 8, "generate": 0, "samples": 0}
    changes = {"strategy": strategy, "rounds": ROUNDS, "training": training, "evaluation": evaluation}
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump({**config, **changes}), encoding="utf-8")
    command = [sys.executable, "-m", "deploy", "run", str(file), "--runs", str(folder), "--name", "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{strategy['name']}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(json.dumps({"strategy": strategy["name"], "exit": done.returncode}), flush=True)
    return read_lines(folder / "run" / "metrics.jsonl")
