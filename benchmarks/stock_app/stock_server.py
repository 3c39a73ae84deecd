"""Flower's FedAvg over the demo's trained weights; writes down each round's seconds and bytes."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    """FedAvg with a clock."""

    rounds: list[dict[str, float]]
    began: float

    def configure_train(self, *args: object, **kwargs: object) -> Iterable[Message]:
        """As FedAvg; a round begins."""
        self.began = time.monotonic()
        return super().configure_train(*args, **kwargs)  # type: ignore[arg-type]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg; a round ends."""
        got = list(replies)
        assert not any(reply.has_error() for reply in got), [str(reply.error) for reply in got if reply.has_error()]
        trained = [float(reply.content["metrics"]["seconds"]) for reply in got]  # type: ignore[arg-type, index]
        up = [sum(len(array.data) for array in reply.content["arrays"].values()) for reply in got]  # type: ignore[union-attr, misc]
        result = super().aggregate_train(server_round, got)
        seconds = time.monotonic() - self.began
        self.rounds.append({"seconds": seconds, "train": max(trained), "up": sum(up) / len(up)})
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    from common.config.federation import FederationConfig, resolved
    from common.config.load import load
    from common.data.tasks import make_task
    from common.model.tuning import tune

    source = Path(str(context.run_config["federation"]))
    config = resolved(load(source, FederationConfig), source)
    task = make_task(config.task)
    base = task.load(str(config.model.path), None, config.model.dtype, config.training.seed)
    state = tune(base.model, config.strategy, task.peft_type).get()
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})
    sites = config.cohort.min_clients
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.rounds = []
    strategy.start(grid, arrays, num_rounds=int(str(context.run_config["rounds"])), timeout=1800)
    down = sum(len(array.data) for array in arrays.values())
    out = {"rounds": strategy.rounds, "down": down}
    Path(str(context.run_config["out"])).write_text(json.dumps(out), encoding="utf-8")
