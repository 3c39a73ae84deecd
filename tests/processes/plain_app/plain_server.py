"""A Flower ServerApp that uses FedSpan's strategies as it would use Flower's own."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict
from plain_client import arrays, make_model
from safetensors.torch import save_file

from strategies import FedIT, FFALoRA, FlexLoRA, RoLoRA

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Every strategy one after the other; ``out`` gets a folder for each."""
    options = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}
    for name, make in {"fedit": FedIT, "ffa-lora": FFALoRA, "rolora": RoLoRA, "flexlora": FlexLoRA}.items():
        out = Path(str(context.run_config["out"])) / name
        out.mkdir()

        def keep(server_round: int, record: ArrayRecord, out: Path = out) -> MetricRecord:
            state = {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
            save_file(state, out / f"round-{server_round}-state.safetensors")
            return MetricRecord({"tensors": len(state)})

        strategy = make(lora_alpha=16.0, **options)
        initial = arrays(get_peft_model_state_dict(make_model(8, 16.0)))
        config = ConfigRecord({"strategy": name})
        rounds = int(context.run_config["rounds"])
        strategy.start(grid, initial, num_rounds=rounds, timeout=120, train_config=config, evaluate_fn=keep)
