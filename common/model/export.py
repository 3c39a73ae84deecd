"""Write a trained model as a folder that transformers or PEFT loads, with the same bytes on every machine.

The machine leaves no mark: no path, no order of a set, and no product whose rounding depends on the processor.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.config.strategy import StrategyConfig
from common.model import families
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B, scaling
from common.model.card import BaseFacts
from common.model.tuning import Tuned

_PREFIX = "base_model.model."  # PEFT's prefix of a model's own names
_MACHINES = ("is_local", "local_files_only", "name_or_path")  # keys by which transformers notes where a file is from


def save(
    folder: Path,
    tuned: Tuned,
    tensors: Mapping[str, Tensor],
    strategy: StrategyConfig,
    tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no useful type
    *,
    base: BaseFacts,
    labelled: bool,
    merged: bool,
) -> None:
    """Write a model, or an adapter, with its tokenizer into a new folder.

    Args:
        folder: the folder, which is empty.
        tuned: the model; afterwards its parameters may have other values.
        tensors: values of the trained parameters, ``tuned.local`` included; LoRA's A and B may have another rank.
        strategy: the federation's strategy.
        tokenizer: the tokenizer, or image processor.
        base: the base model, for an adapter.
        labelled: the model has labels, whose names and order an adapter needs, too.
        merged: write a complete model under LoRA.

    Raises:
        OSError: a file cannot be written.
    """
    if strategy.trains == "weights":
        _fill(tuned, tensors)
        tuned.model.save_pretrained(folder)
    elif merged:
        tuned.model.get_base_model().save_pretrained(folder, state_dict=_merged(tuned, tensors, strategy))
    else:
        _save_adapter(folder, tuned, tensors, base)
        if labelled:  # the head has as many rows, in this order
            tuned.model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        _forget_machine(folder / name)


def _fill(tuned: Tuned, tensors: Mapping[str, Tensor]) -> None:
    tuned.set({name: tensors[name] for name in tensors if name not in tuned.local})
    with torch.no_grad():
        for name, parameter in tuned.local.items():
            parameter.copy_(tensors[name])


def _save_adapter(folder: Path, tuned: Tuned, tensors: Mapping[str, Tensor], base: BaseFacts) -> None:
    """Write an adapter as PEFT does, whose rank is that of ``tensors``."""
    import peft

    model = tuned.model
    found = peft.get_peft_model_state_dict(model) | dict(tensors)
    values = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.r = next(len(tensor) for name, tensor in values.items() if name.endswith(LORA_A))
    config.inference_mode, config.base_model_name_or_path, config.revision = True, base.name, base.revision
    config.target_modules = sorted(config.target_modules)
    config.fan_in_fan_out = any(  # as the base model's files have the weights, in whatever form they are held here
        families.is_transposed(layer) or getattr(layer, "transposed", False)
        for module in model.modules()
        if (layer := getattr(module, "base_layer", None)) is not None
    )
    mapping = None
    if config.task_type is None:  # PEFT finds the model's class by it
        kind = type(model.get_base_model())
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)


def _merged(tuned: Tuned, tensors: Mapping[str, Tensor], strategy: StrategyConfig) -> dict[str, Tensor]:
    """The base model's state with s B A added to each adapted weight, by the base model's names.

    A matrix product is rounded differently by each processor. So the product is summed direction by direction, with
    single operations that IEEE 754 defines to the last bit.
    """
    assert strategy.trains == "lora"  # noqa: S101 - the caller has checked
    modules = dict(tuned.model.get_base_model().named_modules())
    state: dict[str, Tensor] = {}
    for key, value in tuned.model.get_base_model().state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        plain = key.replace(".modules_to_save.default.", ".")
        value = tensors.get(_PREFIX + plain, value).detach().cpu().to(value.dtype)
        layer, _, end = plain.rpartition(".base_layer.")
        a, b = tensors.get(f"{_PREFIX}{layer}{LORA_A}"), tensors.get(f"{_PREFIX}{layer}{LORA_B}")
        if end == BASE_WEIGHT.rpartition(".")[2] and a is not None and b is not None:
            value = tensors.get(_PREFIX + key, value).float().cpu()
            product = torch.zeros(b.shape[0], a.shape[1])
            for left, right in zip(b.float().cpu().T, a.float().cpu(), strict=True):
                product += left[:, None] * right[None, :]
            product *= scaling(strategy.lora_alpha, len(a), rslora=strategy.rslora)
            product = product.T if modules[layer].fan_in_fan_out else product
            value = (value + product).to(modules[layer].base_layer.weight.dtype)
        state[f"{layer}.{end}" if layer else plain] = value.contiguous()
    return state


def _forget_machine(file: Path) -> None:
    if file.exists():
        told = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in told.items() if key not in _MACHINES}
        file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
