"""The trained tensors of a model: base weights (FedFTG) or a PEFT adapter (the LoRA strategies).

Server and sites build the same ``Tuned`` from the same federation file, so that names and shapes agree.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.config.strategy import GaLoreConfig, LoraConfig
from common.errors import ModelError, WireError
from common.model import families, second_moments
from common.model.adapters import BASE_WEIGHT, FACTORS, LORA_A, LORA_B, fresh_a


class Tuned:
    """A model, and which of its tensors are trained.

    Attributes:
        model: the module to call; for LoRA a ``PeftModel``.
        parameters: the parameters that are trained and exchanged, by the name under which they travel.
        local: parameters that are trained but never leave the site.
    """

    def __init__(self, model: Any, parameters: dict[str, nn.Parameter], local: dict[str, nn.Parameter]) -> None:  # noqa: ANN401
        self.model = model
        self.parameters = parameters
        self.local = local

    def get(self) -> dict[str, Tensor]:
        """A copy of the exchanged tensors, on the CPU, in their own dtype."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Write exchanged tensors into the model; second moments, which are the optimizer's, are passed over.

        Raises:
            WireError: a name or shape is not this model's; nothing is written then.
        """
        tensors = {name: tensors[name] for name in second_moments.without(tensors)}
        for name, tensor in tensors.items():
            mine = self.parameters.get(name)
            if mine is None:
                raise WireError(f"{name}: this model trains no such tensor")
            if mine.shape != tensor.shape:
                raise WireError(f"{name}: shape {tuple(tensor.shape)} received, {tuple(mine.shape)} expected")
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)


def tune(
    model: nn.Module,
    config: GaLoreConfig | LoraConfig,
    peft_type: str | None,
    *,
    rank: int | None = None,
    seed: int = 0,
) -> Tuned:
    """Prepare ``model`` for a strategy: freeze it but for the trained tensors.

    Args:
        model: a base model; it is changed.
        config: the federation's strategy section.
        peft_type: PEFT's name of the task, "CAUSAL_LM" or "SEQ_CLS"; None for images.
        rank: LoRA rank of this client; None: the federation's.
        seed: of LoRA's A, which is the same at the server and at every site.

    Raises:
        SelectionError: the strategy's ``modules`` and ``blocks`` match nothing.
        ModelError: the family is unknown, or a rank is above a layer's smaller side.
    """
    layers = families.select(model, config.modules, config.blocks)
    if config.trains == "weights":
        return _base_weights(model, layers, config)
    return _adapter(model, layers, config, peft_type, rank or config.rank, seed)


def first_state(tuned: Tuned, config: GaLoreConfig | LoraConfig, seed: int) -> dict[str, Tensor]:
    """What round 1 starts from: the tensors of the base model, in float32 where base weights are among them.

    Fresh factors are of the federation's rank, whatever ``tuned``'s is.
    """
    state = tuned.get()
    if config.changes_base:
        state = {name: tensor.float() for name, tensor in state.items()}
    if config.optimizer_state == "averaged":
        state |= second_moments.first(state)
    if config.fresh_factors:
        for name, tensor in state.items():
            if name.endswith(LORA_A):
                state[name] = fresh_a(seed, 1, name, (config.rank, tensor.shape[1]))
            elif name.endswith(LORA_B):
                state[name] = torch.zeros(tensor.shape[0], config.rank)
    return state


def _base_weights(model: nn.Module, layers: list[families.SelectedLayer], config: GaLoreConfig) -> Tuned:
    trained = families.freeze_all_but(model, layers)
    head = {name: p for name, p in model.named_parameters() if families.in_head(name) and config.head != "freeze"}
    for parameter in head.values():
        parameter.requires_grad_(True)
    return Tuned(model, trained, head) if config.head == "local" else Tuned(model, trained | head, {})


def _adapter(
    model: nn.Module,
    layers: list[families.SelectedLayer],
    config: LoraConfig,
    peft_type: str | None,
    rank: int,
    seed: int,
) -> Tuned:
    import peft

    for layer in layers:
        smallest = min(model.get_parameter(layer.weight).shape)
        if rank > smallest:
            raise ModelError(f"{layer.weight}: LoRA rank is {rank}; allowed for this layer: 1 to {smallest}")
        if config.changes_base and layer.transposed:
            raise ModelError(
                f"{layer.weight} is kept as (in, out); the strategies that change base weights take (out, in) alone"
            )
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft computes with it as a float
        lora_dropout=config.lora_dropout,
        use_rslora=config.rslora,
        target_modules=[layer.name for layer in layers],
        fan_in_fan_out=any(layer.transposed for layer in layers),
        task_type=peft_type,
        modules_to_save=None if peft_type else ["classifier"],  # the head, which PEFT knows of its own tasks
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, lora)
    exchanged: dict[str, nn.Parameter] = {}
    head: dict[str, nn.Parameter] = {}
    names = set(peft.get_peft_model_state_dict(wrapped))
    for full_name, parameter in wrapped.named_parameters():
        name = full_name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        if (name in names and parameter.requires_grad) or (config.changes_base and name.endswith(BASE_WEIGHT)):
            (exchanged if ".lora_" in name or name.endswith(BASE_WEIGHT) else head)[name] = parameter
    if config.head == "freeze":
        for parameter in head.values():
            parameter.requires_grad_(False)
        head = {}
    elif head:
        _train_in_float32(wrapped)
    local = head if config.head == "local" else {}
    if config.stays_at_site is not None:
        own = FACTORS[config.stays_at_site]
        local = local | {name: parameter for name, parameter in exchanged.items() if name.endswith(own)}
    return Tuned(wrapped, {n: p for n, p in (exchanged | head).items() if n not in local}, local)


def _train_in_float32(wrapped: nn.Module) -> None:
    """Have a head in float32, as PEFT has A and B: in bfloat16 most small steps would be lost."""
    for name, module in wrapped.named_modules():
        if name.endswith(".modules_to_save.default"):
            module.float()
            module.register_forward_pre_hook(_in_float32)  # what the frozen model gives it has that model's type


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return tuple(value.float() for value in inputs)
