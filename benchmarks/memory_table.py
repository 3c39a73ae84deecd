"""GPU memory of training, by the preflight's estimate: Llama-like shapes, whole and quantised bases.

No weight is made: models are built of tensors with shapes alone. ``python -m benchmarks memory-table``
"""

import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.table import Cell, Table
from client.preflight.memory import Batch, estimates
from client.site_model import places_of
from common.config.federation import FederationConfig
from common.config.section import Quantization
from common.model.quantization import Held, replace, shapes_of_codes, untrained
from common.model.tuning import Tuned, tune

if TYPE_CHECKING:
    from transformers import LlamaConfig

#: hidden, intermediate, blocks, heads, heads of keys and values, vocabulary, embeddings tied to the output.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "3B": (3072, 8192, 28, 24, 8, 128_256, True),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
}
LORA = {"name": "fedit", "modules": "linear", "blocks": "all", "rank": 16}
FEDFTG = {"name": "fedftg", "blocks": "lower third", "rank": 128, "subspace": "shared", "moments": "8bit"}
WAYS: dict[str, tuple[dict[str, Any], Quantization]] = {
    "LoRA": (LORA, "whole"),
    "LoRA, int8": (LORA, "int8"),
    "LoRA, nf4": (LORA, "nf4"),
    "FedFTG": (FEDFTG, "whole"),
    "FedFTG, nf4": (FEDFTG, "nf4"),
}
CARDS = (16, 24, 48, 80)  # GB
LENGTH = 1024
_SPARE = 1.0  # GB: CUDA's context and kernels


def run() -> Table:
    """Every shape in every way, with one and four rows in a forward pass."""
    rows: list[dict[str, Cell]] = []
    for shape in SHAPES:
        for way, (strategy, quantization) in WAYS.items():
            found = peaks(shape, strategy, quantization)
            row: dict[str, Cell] = {"model": shape, "way": way}
            row |= {f"GB, batch {batch}": round(need, 1) for batch, need in found.items()}
            row["GB on each of two, batch 1"] = round(peaks(shape, strategy, quantization, batches=(1,), cards=2)[1], 1)
            row["card, GB"] = next((card for card in CARDS if found[1] + _SPARE <= card), None)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    notes = [
        f"bfloat16 weights and autocast, rows of {LENGTH} tokens, gradient checkpointing. LoRA: rank 16, all linear "
        "layers. FedFTG: MLPs of the lower third, rank 128, `subspace` shared, `moments` 8bit. nf4 and int8: "
        "`model.quantization`.",
        "two: the fullest of two cards that the model is split over (`split`).",
        f"card: the smallest of {', '.join(map(str, CARDS))} GB that holds batch 1 with {_SPARE:g} GB for CUDA itself.",
    ]
    return Table("GPU memory of training, by the preflight's estimate", rows, notes)


def peaks(
    shape: str,
    strategy: dict[str, Any],
    quantization: Quantization,
    *,
    length: int = LENGTH,
    batches: tuple[int, ...] = (1, 4),
    cards: int = 1,
) -> dict[int, float]:
    """GB at the peak, by rows in a forward pass; on the fullest of several cards that share the model.

    Args:
        shape: a key of ``SHAPES``.
        strategy: the strategy section of the federation file.
        quantization: form of the untrained weights.
        length: tokens of a row.
        batches: rows in a forward pass.
        cards: number of cards that the model is split over.
    """
    training = {"learning_rate": 1e-4, "local_steps": 10, "max_length": length, "gradient_checkpointing": True}
    found = {}
    for batch in batches:
        federation = FederationConfig.model_validate(
            {
                "name": "table",
                "model": {"path": "x", "dtype": "bfloat16", "quantization": quantization},
                "strategy": strategy,
                "rounds": 1,
                "training": {**training, "batch_size": batch},
            }
        )
        tuned = _tuned(shape, federation)
        devices = [torch.device("cuda", index) for index in range(cards)]
        where = places_of(tuned, federation, devices, [0] * cards) if cards > 1 else {}
        each = estimates(tuned, federation, Batch(batch, length), 10, torch.bfloat16, where)
        found[batch] = max(peak.total for peak in each.values()) / 1e9
    return found


def config_of(shape: str) -> "LlamaConfig":
    """The configuration of a row's model."""
    from transformers import LlamaConfig

    hidden, intermediate, blocks, heads, kv, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        use_cache=False,
        dtype="bfloat16",
    )


def _tuned(shape: str, federation: FederationConfig) -> Tuned:
    """A model without values, as a site would hold it."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config_of(shape), dtype=torch.bfloat16)
        quantization = federation.model.quantization
        if quantization != "whole":
            for name in untrained(model, Held(quantization, federation.strategy)):
                weight = model.get_parameter(f"{name}.weight")
                replace(model, name, weight, shapes_of_codes(weight.shape, quantization), "")
        tuned = tune(model, federation.strategy, "CAUSAL_LM")
    return _as_on_a_cpu(tuned)


def _as_on_a_cpu(tuned: Tuned) -> Tuned:
    """The same model of tensors that have a place, and still no values."""
    made: dict[int, nn.Parameter] = {}
    with FakeTensorMode():
        for module in tuned.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                module._parameters[name] = None if parameter is None else made[id(parameter)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    trained, local = ({n: made[id(p)] for n, p in which.items()} for which in (tuned.parameters, tuned.local))
    return Tuned(tuned.model, trained, local)
