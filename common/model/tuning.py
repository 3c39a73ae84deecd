"""The trained tensors of a model: base weights (FedFTG) or a PEFT adapter (the LoRA strategies).

Server and sites build the same ``Tuned`` from the same federation file, so that names and shapes agree.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.config.galore import GaLoreConfig
from common.config.traits import LoraConfig
from common.errors import ModelError, WireError
from common.model import families, second_moments
from common.model.adapters import BASE_WEIGHT, FACTORS, LORA_A, LORA_B, fresh_a
from common.model.quantization import QuantizedLinear, is_quantized


class Tuned:
    """A model, and which of the model's tensors are trained.

    Attributes:
        model: the module to call; for LoRA a ``PeftModel``.
        parameters: parameters that the site trains and sends, by their names in messages.
        local: parameters that the site trains but never sends.

    Example:
        >>> tuned = Tuned(layer := nn.Linear(3, 2), {"weight": layer.weight}, local={"bias": layer.bias})
        >>> state = tuned.get()  # a copy of the weight (2, 3)
        >>> tuned.set({"weight": torch.zeros(2, 3)})
        >>> bool(layer.weight.any()), list(state)
        (False, ['weight'])
    """

    def __init__(self, model: Any, parameters: dict[str, nn.Parameter], local: dict[str, nn.Parameter]) -> None:  # noqa: ANN401
        self.model = model
        self.parameters = parameters
        self.local = local

    def get(self) -> dict[str, Tensor]:
        """Copy ``parameters`` to the CPU, each in its own dtype."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Write received tensors into ``parameters``; second moments are skipped, because they are the optimizer's.

        Raises:
            WireError: a name or shape does not match this model; then nothing is written.
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
    """Prepare ``model`` for a strategy: add an adapter under LoRA, freeze all but the trained tensors.

    Args:
        model: a base model; changed in place.
        config: the federation's strategy section.
        peft_type: PEFT's name for the task, "CAUSAL_LM" or "SEQ_CLS"; None for images.
        rank: LoRA rank of this client; None: the federation's.
        seed: seed for LoRA's A, which is the same at the server and at every site.

    Raises:
        SelectionError: the strategy's ``modules`` and ``blocks`` match nothing.
        ModelError: the family is unknown, or a rank is above a layer's smaller side.
    """
    layers = families.select(model, config.modules, config.blocks)
    for layer in layers if config.changes_base else []:
        if isinstance(held := model.get_submodule(layer.name), QuantizedLinear):
            raise ModelError(
                f"{layer.weight} is held in {held.quantization}, and `strategy` {config.name} changes it; load the "
                "model for this strategy"
            )
    if config.trains == "weights":
        return _base_weights(model, layers, config)
    return _adapter(model, layers, config, peft_type, rank or config.rank, seed)


def first_state(tuned: Tuned, config: GaLoreConfig | LoraConfig, seed: int) -> dict[str, Tensor]:
    """The federation's state before round 1; float32 where the strategy changes base weights (decision 005).

    New factors A and B get the federation's rank, also when ``tuned`` has another.
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
        module: Any = model.get_submodule(layer.name)
        smallest = min((module.out_features, module.in_features) if is_quantized(module) else module.weight.shape)
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
        fan_in_fan_out=any(families.is_transposed(model.get_submodule(layer.name)) for layer in layers),
        task_type=peft_type,
        modules_to_save=families.head_modules(model) or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, lora)
    _round_as_beside_whole(wrapped)
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


def _round_as_beside_whole(wrapped: nn.Module) -> None:
    """Round new factors beside a weight in codes as PEFT does beside the whole weight: A is the same at every site."""
    for module in wrapped.modules():
        if isinstance(base := getattr(module, "base_layer", None), QuantizedLinear):
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(base.dtype).to(parameter.dtype)


def _train_in_float32(wrapped: nn.Module) -> None:
    """Train the head in float32, like PEFT's A and B: bfloat16 rounds most small steps to nothing."""
    for name, module in wrapped.named_modules():
        if name.endswith(".modules_to_save.default"):
            module.float()
            module.register_forward_pre_hook(_in_float32)  # the frozen model's outputs have the model's own dtype


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return tuple(value.float() for value in inputs)
