"""A Flower ServerApp that uses FedSpan's strategies as it would use Flower's own."""

from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict
from plain_client import arrays, make_model, mlp_weights
from safetensors.torch import save_file

from strategies import FedFTG, FedIT, FFALoRA, FlexLoRA, RoLoRA

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Every strategy one after the other; ``out`` gets a folder for each."""
    model = make_model(8, 16.0)
    adapter, mlps = get_peft_model_state_dict(model), mlp_weights(model)
    options = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}
    for name, make, initial, rounds in (
        ("fedftg", FedFTG, mlps, 1),
        ("fedit", partial(FedIT, lora_alpha=16.0), adapter, 1),
        ("ffa-lora", partial(FFALoRA, lora_alpha=16.0), adapter, 1),
        ("rolora", partial(RoLoRA, lora_alpha=16.0), adapter, 2),
        ("flexlora", partial(FlexLoRA, lora_alpha=16.0), adapter, 2),
    ):
        out = Path(str(context.run_config["out"])) / name
        out.mkdir()

        def keep(server_round: int, record: ArrayRecord, out: Path = out) -> MetricRecord:
            state = {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
            save_file(state, out / f"round-{server_round}-state.safetensors")
            return MetricRecord({"tensors": len(state)})

        config = ConfigRecord({"strategy": name})
        make(**options).start(
            grid, arrays(initial), num_rounds=rounds, timeout=120, train_config=config, evaluate_fn=keep
        )
