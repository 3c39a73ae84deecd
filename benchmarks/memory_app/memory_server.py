"""One round of FedAvg, or of FedFTG; writes down the peak of this process's memory."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from memory_client import SHAPES

from common.system.machine import resident_peak
from strategies import FedFTG

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Both start from the same weights, and both send them to all clients."""
    clients = int(str(context.run_config["clients"]))
    options = {"fraction_evaluate": 0.0, "min_train_nodes": clients, "min_available_nodes": clients}
    strategy = (FedAvg if context.run_config["strategy"] == "FedAvg" else FedFTG)(**options)  # type: ignore[arg-type]
    before = resident_peak()
    arrays = ArrayRecord({name: Array(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()})
    result = strategy.start(grid, arrays, num_rounds=1, timeout=3000)
    mean = float(np.mean([array.numpy().mean() for array in result.arrays.values()]))
    peak = resident_peak()
    out = {"before": before, "peak": peak, "mean": mean}
    Path(str(context.run_config["out"])).write_text(json.dumps(out), encoding="utf-8")
