"""A Flower ServerApp that uses FedSpan's strategies as it would use Flower's own."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict
from plain_client import arrays, make_model
from safetensors.torch import save_file

from strategies import FedIT, FFALoRA, FlexLoRA, RoLoRA

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    out = context.run_config["out"]
    options = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}
    strategy = {
        "fedit": lambda: FedIT(lora_alpha=16.0, **options),
        "ffa-lora": lambda: FFALoRA(lora_alpha=16.0, **options),
        "rolora": lambda: RoLoRA(lora_alpha=16.0, **options),
        "flexlora": lambda: FlexLoRA(lora_alpha=16.0, **options),
    }[str(context.run_config["strategy"])]()

    def keep(server_round: int, record: ArrayRecord) -> MetricRecord:
        state = {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
        save_file(state, f"{out}/round-{server_round}-state.safetensors")
        return MetricRecord({"tensors": len(state)})

    initial = arrays(get_peft_model_state_dict(make_model(8, 16.0)))
    strategy.start(grid, initial, num_rounds=int(context.run_config["rounds"]), timeout=120, evaluate_fn=keep)
