"""Held-out loss of federations over a quantised base, and of sites that hold it differently, against whole weights.

SmolLM2-135M on two of the demo's sites, in one process. ``python -m benchmarks quantised-base``
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.table import Cell, Table
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from deploy.demo.prepare import DEFAULT_CACHE, prepare
from deploy.experiment.simulate import simulate
from server.run.folder import read_lines

DEMO = Path(__file__).parents[1] / "deploy" / "demo" / "federation.yaml"
CHOSEN = {"modules": "mlp", "blocks": "lower third", "rank": 16}
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedit": {"strategy": {"name": "fedit", **CHOSEN, "lora_alpha": 32.0}, "rate": 1.0e-3},
    "fedftg": {"strategy": {"name": "fedftg", **CHOSEN}, "rate": 8.0e-3},
}
#: How the federation says that the base is held, and how the sites hold it.
BASES: dict[str, tuple[str, tuple[str, str]]] = {
    "whole": ("whole", ("whole", "whole")),
    "nf4": ("nf4", ("nf4", "nf4")),
    "nf4 and whole": ("nf4", ("nf4", "whole")),
    "int8": ("int8", ("int8", "int8")),
}
ROUNDS = 2


def run() -> Table:
    """One short federation for each strategy and form of the base."""
    prepare(DEFAULT_CACHE)
    rows: list[dict[str, Cell]] = []
    for name in STRATEGIES:
        for base in BASES:
            with tempfile.TemporaryDirectory(prefix="bench-quantised-") as folder:
                rows.append({"strategy": name, "base": base, **_federate(Path(folder), name, base)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for row in rows:
        whole = next(r for r in rows if (r["strategy"], r["base"]) == (row["strategy"], "whole"))
        row["loss after, minus whole's"] = float(row["loss after"]) - float(whole["loss after"])  # type: ignore[arg-type]
    return Table(
        "Held-out loss over a quantised base against whole weights",
        rows,
        [
            f"SmolLM2-135M in float32, MLPs of the lower third, rank 16; two sites, {ROUNDS} rounds of 4 steps of 4 "
            "rows. Loss: mean over the sites, each with the base as that site holds it, nats per token.",
        ],
    )


def _federate(folder: Path, name: str, base: str) -> dict[str, Cell]:
    held, sites = BASES[base]
    config = resolved(load(DEMO, FederationConfig), DEMO).model_dump(mode="json")
    files = []
    for file, quantization in zip(config["local"]["sites"][: len(sites)], sites, strict=True):
        site = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        site["data"]["path"] = str((Path(file).parent / site["data"]["path"]).resolve())
        site = {key: site[key] for key in ("name", "data")} | {"device": "cpu", "quantization": quantization}
        site["policy"] = {"score_step": 1e-6, "min_rows_per_update": 1}  # scores as they are
        files.append(folder / f"{site['name']}.yaml")
        files[-1].write_text(yaml.safe_dump(site), encoding="utf-8")
    rate = STRATEGIES[name]["rate"]
    config |= {
        "strategy": STRATEGIES[name]["strategy"],
        "rounds": ROUNDS,
        "cohort": {**config["cohort"], "min_clients": len(sites)},
        "model": {**config["model"], "quantization": held, "site_quantization": ["whole", "nf4"]},
        "training": {**config["training"], "learning_rate": rate, "local_steps": 4, "batch_size": 4},
        "evaluation": {**config["evaluation"], "every": ROUNDS, "max_examples": 12, "generate": 0, "server": None},
        "local": {"sites": [str(file) for file in files]},
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    started = time.process_time()
    simulate(folder / "federation.yaml", folder / "run", 1, keep_model=False)
    records = read_lines(folder / "run" / "metrics.jsonl")
    losses = [
        [r["evaluate"]["loss"] for r in records if r["phase"] == "evaluate" and r["round"] == number]
        for number in (0, ROUNDS)
    ]
    means = {key: sum(found) / len(found) for key, found in zip(("loss before", "loss after"), losses, strict=True)}
    return {**means, "CPU seconds": time.process_time() - started}
