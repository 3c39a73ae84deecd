"""Answers with 100 MB of numbers. Only a few clients at a time, so that many fit on one machine."""

import fcntl
from pathlib import Path
from typing import IO

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
AT_ONCE, SHAPES = 3, {f"model.layers.{i}.w.weight": (2048, 1600) for i in range(8)}  # 105 MB in float32
locks: list[IO[str]] = []


@app.train()
def train(message: Message, context: Context) -> Message:
    """Every client's own numbers."""
    site = int(context.node_config["site"])
    lock = (Path(str(context.run_config["out"])).parent / f"lock-{site % AT_ONCE}").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    locks.append(lock)  # held until the process ends, which is when the answer has gone
    rng = np.random.default_rng(site)
    arrays = ArrayRecord({name: Array(rng.random(shape, dtype=np.float32)) for name, shape in SHAPES.items()})
    return Message(
        RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": site + 1})}), reply_to=message
    )
