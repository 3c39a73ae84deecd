"""One case on one device: a model of random weights, a method, a few optimizer steps of the product's own loop."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.gpu.energy import Meter
from client.training.ranks import Ranks
from client.training.settings import make_optimizer
from client.training.trainer import train
from common.config.strategy import FedFTGConfig, FedITConfig
from common.config.task import CausalLMTask
from common.config.training import TrainingConfig
from common.data.chat import Example, collate
from common.data.packing import choose
from common.data.tasks import make_task
from common.model.families import select
from common.model.quantization import Held, quantize, replace, untrained
from common.model.tuning import tune
from common.system.machine import resident_peak

Told = dict[str, float | str | None]

#: Llama's own shapes: 3.2-1B and 3.1-8B; the twin's stand in for them where there is no GPU.
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}
METHODS = ("LoRA", "QLoRA", "FedFTG on nf4", "GaLore", "galore-torch", "full AdamW")


@dataclass(frozen=True)
class Case:
    """A training to measure.

    Attributes:
        shape: one of ``SHAPES``.
        method: one of ``METHODS``.
        dtype: type of the weights and of the arithmetic.
        rank: rank of GaLore's subspace; LoRA has 16 in place of more.
        rows: rows per step.
        width: tokens per row; half of them count.
        steps: optimizer steps; the first ``warm`` are not timed.
        checkpointing: whether blocks are computed again in the backward pass.
    """

    shape: str
    method: str
    dtype: str = "bfloat16"
    rank: int = 128
    rows: int = 4
    width: int = 512
    steps: int = 8
    warm: int = 2
    checkpointing: bool = False


def measure(case: Case) -> Told:
    """Train; returns the peak of memory in GB, tokens per second, joules per thousand tokens, and the losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = TrainingConfig(
        learning_rate=1e-4,
        batch_size=case.rows,
        local_steps=case.steps,
        max_length=case.width,
        gradient_checkpointing=case.checkpointing,
    )
    model, optimizer = _prepared(case, training, device)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    task, rows = make_task(CausalLMTask()), _rows(case, model)
    autocast = torch.bfloat16 if case.dtype == "bfloat16" else None  # as a site picks it
    packing = choose(model, "auto", autocast, packs=True)
    weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    began: list[tuple[float, Meter]] = []
    losses: list[float] = []

    def loss_sum(some: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        summed, counted = task.loss_sum(some, batch)
        losses.append(summed.item() / counted)
        return summed, counted

    def on_step(done: int, _: int) -> None:
        if done == case.warm:
            _wait(device)
            began.append((time.monotonic(), Meter()))

    result = train(
        model,
        optimizer,
        rows,
        lambda some: collate(some, 0, packing),
        loss_sum,
        training,
        server_round=1,
        rounds=1,
        max_batch_size=None,
        ranks=Ranks([device]),
        autocast=autocast,
        seed="gpu",
        on_step=on_step,
    )
    _wait(device)
    seconds, joules = time.monotonic() - began[0][0], began[0][1].joules()
    tokens = (case.steps - case.warm) * case.rows * case.width
    peak = result.peak_memory_bytes if device.type == "cuda" else resident_peak()
    return {
        "peak GB": peak / 1e9,
        "at rest GB": weights / 1e9 if weights else None,
        "tokens / s": tokens / seconds,
        "J / 1000 tokens": None if joules is None else 1e3 * joules / tokens,
        "rows at once": result.micro_batch,
        "loss first": result.loss_first,
        "loss last": result.loss_last,
        "losses": " ".join(f"{loss:.6g}" for loss in losses),
    }


def _prepared(case: Case, training: TrainingConfig, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """Model and optimizer; on the device."""
    lora, blocks = FedITConfig(modules="linear", rank=min(case.rank, 16)), "all"
    if case.method == "FedFTG on nf4":
        blocks = "lower third"
    galore = FedFTGConfig(modules="mlp" if blocks != "all" else "linear", blocks=blocks, rank=case.rank)
    model = _model(case, device)
    if case.method in ("QLoRA", "FedFTG on nf4"):
        _quantize(model, Held("nf4", lora if case.method == "QLoRA" else galore, str(device)))
    if case.method == "full AdamW":
        model.train()
        return model, torch.optim.AdamW(model.parameters(), lr=training.learning_rate)
    if case.method == "galore-torch":
        from galore_torch import GaLoreAdamW

        chosen = [model.get_parameter(layer.weight) for layer in select(model, galore.modules, galore.blocks)]
        model.requires_grad_(False)
        for weight in chosen:
            weight.requires_grad_(True)
        group = {"params": chosen, "rank": case.rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        peer: torch.optim.Optimizer = GaLoreAdamW([group], lr=training.learning_rate, no_deprecation_warning=True)
        return model, peer
    strategy = lora if case.method in ("LoRA", "QLoRA") else galore
    tuned = tune(model, strategy, "CAUSAL_LM")
    tuned.model.to(device)
    return tuned.model, make_optimizer(tuned.parameters, training, strategy, 1, None, None)


def _model(case: Case, device: torch.device) -> Any:  # noqa: ANN401
    small = case.shape == "tiny"
    sizes: dict[str, Any] = SHAPES[case.shape]
    config = hf.LlamaConfig(
        vocab_size=512 if small else 128_256,
        num_key_value_heads=2 if small else 8,
        tie_word_embeddings=case.shape == "1B",
        max_position_embeddings=8192,
        **sizes,
    )
    torch.manual_seed(0)
    with device:
        return hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))


def _quantize(model: Any, held: Held) -> None:  # noqa: ANN401
    """Hold what is not trained in 4 bit, layer by layer."""
    for name in untrained(model, held):
        weight = model.get_submodule(name).weight.detach()
        codes = quantize(weight, held.quantization, held.device)
        replace(model, name, weight, {key: code.to(weight.device) for key, code in codes.items()}, "")


def _rows(case: Case, model: Any) -> list[Example]:  # noqa: ANN401
    """Rows that can be learned: a token, and then each the one before plus a step that the row has throughout."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, rows = model.get_input_embeddings().num_embeddings, []
    for _ in range(8 * case.rows):
        start, step = torch.randint(1, min(vocabulary, 512), (2,), generator=generator).tolist()
        rows.append(Example([(start + step * place) % vocabulary for place in range(case.width)], case.width // 2))
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
