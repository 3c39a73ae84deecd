"""The demo's site as one would write it with stock Flower and galore-torch: dense tensors, a process per message.

Rows, batches and the loop are FedSpan's, so that both sides do the same work.
"""

import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load everything, train, return every trained weight."""
    import torch

    if context.run_config["light"]:
        return light(message)
    from galore_torch import GaLoreAdamW

    from client.training.ranks import Ranks
    from client.training.trainer import train as loop
    from common.config.federation import FederationConfig, resolved
    from common.config.load import load
    from common.config.site import SiteConfig
    from common.data.rows import load_rows, split_held_out
    from common.data.tasks import make_task
    from common.model.tuning import tune

    source, site_file = Path(str(context.run_config["federation"])), Path(str(context.node_config["site"]))
    config, site = resolved(load(source, FederationConfig), source), load(site_file, SiteConfig)
    strategy, training, task = config.strategy, config.training, make_task(config.task)
    assert strategy.trains == "weights"
    base = task.load(str(config.model.path), None, config.model.dtype, training.seed)
    tuned = tune(base.model, strategy, task.peft_type)
    received = message.content["arrays"]
    assert isinstance(received, ArrayRecord)
    tuned.set({name: torch.from_numpy(array.numpy().copy()) for name, array in received.items()})
    rows, _ = split_held_out(load_rows(site.data, site_file).rows, site.data.held_out)
    encoded = task.examples(base.tokenizer, rows, site.data.system, training.max_length)
    started = time.monotonic()
    group = {
        "params": list(tuned.parameters.values()),
        "rank": strategy.rank,
        "update_proj_gap": 200,
        "scale": strategy.scale,
        "proj_type": "std",
    }
    number = int(message.content["config"]["server-round"])  # type: ignore[arg-type]
    loop(
        tuned.model,
        GaLoreAdamW([group], lr=training.learning_rate, no_deprecation_warning=True),
        encoded,
        task.collater(base.tokenizer),
        task.loss_sum,
        training,
        server_round=number,
        rounds=config.rounds,
        max_batch_size=None,
        ranks=Ranks([torch.device("cpu")]),
        autocast=None,
        seed=f"{training.seed}/{site.name}/{number}",
    )
    metrics = MetricRecord({"num-examples": len(encoded), "seconds": time.monotonic() - started})
    arrays = ArrayRecord({name: Array(p.detach().numpy()) for name, p in tuned.parameters.items()})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def light(message: Message) -> Message:
    """Return the weights that were sent, a little changed."""
    received = message.content["arrays"]
    assert isinstance(received, ArrayRecord)
    arrays = ArrayRecord({name: Array(array.numpy() + 1e-5) for name, array in received.items()})
    metrics = MetricRecord({"num-examples": 64, "seconds": 0.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
