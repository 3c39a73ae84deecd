"""A LoRA client written with Flower, PEFT and transformers alone; it knows nothing of FedSpan.

What it receives and returns is also written to disk, so that a test can compute the server's result by itself.
"""

import peft
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

app = ClientApp()


def make_model(rank: int, alpha: float) -> peft.PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    return peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["up_proj", "q_proj"]))


def mlp_weights(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What a client of FedFTG trains."""
    return {name: p for name, p in model.named_parameters() if "up_proj" in name and "lora" not in name}


def arrays(tensors: dict[str, torch.Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().numpy()) for name, tensor in tensors.items()})


@app.train()
def train(message: Message, context: Context) -> Message:
    site = int(context.node_config["partition-id"])
    config = message.content.config_records["config"]
    mixed = config["strategy"] == "flexlora"  # the only one that allows different ranks and alphas
    rank, alpha = (int(context.node_config["rank"]), float(context.node_config["alpha"])) if mixed else (8, 16.0)
    received = {k: torch.from_numpy(v.numpy().copy()) for k, v in message.content.array_records["arrays"].items()}

    model = make_model(rank, alpha)
    active = set(config["active"])
    if config["strategy"] == "fedftg":
        own = mlp_weights(model)
        model.load_state_dict(received, strict=False)
    else:
        own = peft.get_peft_model_state_dict(model)
        fitting = {name: tensor for name, tensor in received.items() if own[name].shape == tensor.shape}
        peft.set_peft_model_state_dict(model, fitting)
    parameters = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([parameters[name].requires_grad_() for name in active], lr=1.0)
    torch.manual_seed(100 * site + int(config["server-round"]))
    ids = torch.randint(0, 32, (4, 8))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained = {name: parameters[name].detach().clone() for name in own}

    stem = f"{context.run_config['out']}/{config['strategy']}/round-{config['server-round']}-site-{site}"
    save_file(received, f"{stem}-received.safetensors")
    save_file({k: v.contiguous() for k, v in trained.items()}, f"{stem}-trained.safetensors")
    metrics = MetricRecord({"num-examples": 10 + 7 * site, "lora-alpha": alpha})
    return Message(RecordDict({"arrays": arrays(trained), "metrics": metrics}), reply_to=message)
