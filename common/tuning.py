"""The trained tensors of a model: base weights (FedFTG) or a PEFT adapter (the LoRA strategies).

Server and sites build the same ``Tuned`` from the same federation file, so that names and shapes agree.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import families
from common.config import FedFTGConfig, LoraConfig
from common.errors import ModelError, WireError


class Tuned(ABC):
    """A model, and which of its tensors are trained.

    Attributes:
        model: the module to call; for LoRA a ``PeftModel``.
        parameters: the trained parameters by the name under which they travel.
    """

    model: Any
    parameters: dict[str, nn.Parameter]

    def get(self) -> dict[str, Tensor]:
        """A copy of the trained tensors, on the CPU, in their own dtype."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into the model.

        Raises:
            WireError: a name or shape is not this model's; nothing is written then.
        """
        for name, tensor in tensors.items():
            mine = self.parameters.get(name)
            if mine is None:
                raise WireError(f"{name}: this model trains no such tensor")
            if mine.shape != tensor.shape:
                raise WireError(f"{name}: shape {tuple(tensor.shape)} received, {tuple(mine.shape)} expected")
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the fine-tuned result as a folder that transformers or peft load."""


class TunedWeights(Tuned):
    """Selected weight matrices of the base model itself."""

    def __init__(self, model: nn.Module, config: FedFTGConfig) -> None:
        self.model = model
        self.parameters = families.freeze_all_but(model, families.select(model, config.modules, config.blocks))

    def save(self, folder: Path) -> None:
        """See ``Tuned.save``: a full model for ``AutoModelForCausalLM.from_pretrained``."""
        self.model.save_pretrained(folder)


class TunedAdapter(Tuned):
    """A LoRA adapter made by peft on the selected linear layers; names as in PEFT's state dict."""

    def __init__(self, model: nn.Module, config: LoraConfig, rank: int, seed: int) -> None:
        import peft

        layers = families.select(model, config.modules, config.blocks)
        for layer in layers:
            smallest = min(model.get_parameter(layer.weight).shape)
            if rank > smallest:
                raise ModelError(f"{layer.weight}: LoRA rank {rank} is above the layer's {smallest}")
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft computes with it as a float
            lora_dropout=config.lora_dropout,
            use_rslora=config.rslora,
            target_modules=[layer.name for layer in layers],
            fan_in_fan_out=any(layer.transposed for layer in layers),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same A at the server and at every site
            self.model = peft.get_peft_model(model, lora)
        names = set(peft.get_peft_model_state_dict(self.model))
        self.parameters = {}
        for full_name, parameter in self.model.named_parameters():
            name = full_name.replace(".default.", ".")
            if name in names:
                self.parameters[name] = parameter

    def save(self, folder: Path) -> None:
        """See ``Tuned.save``: an adapter folder for ``PeftModel.from_pretrained``."""
        self.model.save_pretrained(folder)


def tune(model: nn.Module, config: FedFTGConfig | LoraConfig, *, rank: int | None = None, seed: int = 0) -> Tuned:
    """Prepare ``model`` for a strategy: freeze it but for the trained tensors.

    Args:
        model: a base model; it is changed.
        config: the federation's strategy section.
        rank: LoRA rank of this client; None: the federation's.
        seed: seed of LoRA's A.

    Raises:
        SelectionError: the strategy's ``modules`` and ``blocks`` match nothing.
        ModelError: the family is unknown, or a rank is above a layer's smaller side.
    """
    if isinstance(config, FedFTGConfig):
        return TunedWeights(model, config)
    return TunedAdapter(model, config, rank or config.rank, seed)
