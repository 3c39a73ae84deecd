"""Load a base model weight by weight into 4 or 8 bit, so that the whole model is never in memory.

transformers' loader hands every weight that a quantizer asks for to the quantizer, one at a time. FedSpan's takes the
weight's digest, keeps its codes, and puts layers in codes into the model when all weights have come.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from common.errors import ModelError
from common.model import families
from common.model.quantization import Held, check_installed, quantize, replace, untrained
from common.protocol.digest import tensor_digest, tensors_digest

_METHOD = "fedspan"


def on_the_fly(held: Held) -> QuantizationConfigMixin:
    """The ``quantization_config`` with which ``from_pretrained`` quantises whole weights; the model does not keep it.

    Raises:
        ModelError: bitsandbytes is needed and not installed.
    """
    check_installed(held.quantization)
    return _Config(held)


def check_stored(source: str, config: Any, held: Held) -> bool:  # noqa: ANN401 - of transformers
    """Whether a model's files hold quantised weights.

    Raises:
        ModelError: in a form that is not read here, or in another than ``held``; or the strategy needs whole weights.
    """
    stored = next((q for part in (config, getattr(config, "text_config", None)) if (q := _stored(part))), None)
    if stored is None:
        return False
    where = f"model {source} is stored quantised ({stored}, by `quantization_config` of its config.json)"
    if stored not in ("nf4", "int8"):
        raise ModelError(
            f"{where}, which cannot be trained on here; allowed: bitsandbytes' nf4 and int8, or the model it was made "
            "of, with `model.quantization` nf4 to save memory"
        )
    strategy = held.strategy
    if strategy is not None and (strategy.changes_base or getattr(strategy, "merge", False)):
        what = "changes base weights" if strategy.changes_base else "with `merge` writes a complete model"
        raise ModelError(
            f"{where}, and `strategy` {strategy.name} {what}, which needs whole weights; take the model it was made "
            f"of, with `model.quantization: {stored}`, or a LoRA strategy without `merge`"
        )
    if held.quantization != stored and not held.as_stored:
        raise ModelError(
            f"{where}, and is to be held {held.quantization}; write `model.quantization: {stored}`, or take the model "
            "it was made of"
        )
    check_installed("nf4")  # which reads both forms
    return True


def _stored(config: Any) -> str | None:  # noqa: ANN401
    """The form of the weights in the files, as far as a name tells it; None: whole."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return None
    told = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = str(told.get("quant_method", "by a method of its own"))
    if method != "bitsandbytes":
        return method
    return "int8" if told.get("load_in_8bit") else str(told.get("bnb_4bit_quant_type", "fp4"))


def take_stored(model: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
    """Put FedSpan's layers into the places of bitsandbytes', which transformers has loaded; the codes are the same.

    The digest of such a weight is that of its codes: whole weights are nowhere.
    """
    codes: dict[str, Tensor]
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            codes = {"weight": module.weight.data.view(torch.uint8).reshape(-1, 1), "absmax": state.absmax}
            if state.nested:
                codes |= {"nested": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
            shape = state.shape
        elif type(module).__name__ == "Linear8bitLt":
            codes, shape = {"weight": module.weight.data, "scale": module.weight.SCB}, module.weight.shape
        else:
            continue
        codes = {key: tensor.detach().as_subclass(Tensor).clone() for key, tensor in codes.items()}
        replace(model, name, torch.empty(shape, dtype=dtype, device="meta"), codes, tensors_digest(codes))
    model.hf_quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # PEFT takes the layers for bitsandbytes' own by these
        if hasattr(model, mark):
            delattr(model, mark)


class _Config(QuantizationConfigMixin):
    quant_method = _METHOD  # type: ignore[assignment]  # transformers lists its own methods alone

    def __init__(self, held: Held) -> None:
        self.held = held


class _Quantizer(HfQuantizer):
    """Called by transformers' loader; ``ready`` has shape-giving weights, codes and digests by the layer's path."""

    def __init__(self, quantization_config: _Config, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **kwargs)
        self.held = quantization_config.held
        self.layers: set[str] = set()
        self.ready: dict[str, tuple[Tensor, dict[str, Tensor], str]] = {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:  # noqa: ANN401
        self.layers = set(untrained(model, self.held))

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:  # noqa: ANN401
        """Whether a tensor is the weight of a layer that is held in codes."""
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.layers

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that the loader applies to such a weight."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:  # noqa: ANN401
        for name, (weight, codes, digest) in self.ready.items():
            replace(model, name, weight, codes, digest)
        self.ready.clear()
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        """Never: finished models are written with whole weights."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters and whole layers are."""
        return True


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(_METHOD)(_Quantizer)


class _Quantize(ConversionOps):
    def __init__(self, quantizer: _Quantizer) -> None:
        self._quantizer = quantizer

    def convert(  # type: ignore[override]  # the loader names all arguments
        self,
        input_dict: dict[str, Any],
        *,
        model: Any,  # noqa: ANN401
        **_: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """The codes in place of each weight; other tensors of the same step as they are."""
        found = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            if self._quantizer.param_needs_quantization(model, name):
                layer = name.removesuffix(".weight")
                weight = tensor.T.contiguous() if families.is_transposed(model.get_submodule(layer)) else tensor
                codes = quantize(weight, self._quantizer.held.quantization, self._quantizer.held.device)
                self._quantizer.ready[layer] = (weight.to("meta"), codes, tensor_digest(tensor))
                tensor = codes["weight"]
            found[name] = tensor
        return found
