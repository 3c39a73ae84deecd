"""Linear layers whose weight is held in 4 or 8 bit, because nobody trains the weight (decision 036).

    nf4    4 bit a weight, and an 8-bit scale for every 64, by bitsandbytes (arXiv 2305.14314): 0.516 bytes
    int8   8 bit a weight, and a float32 scale for every row, as in bitsandbytes' ``Linear8bitLt``: 1 byte

A layer computes with the whole weight, which it makes anew for every pass, forward and backward, in the type of the
pass. Inputs are never rounded to 8 bit, so training and evaluation compute the same. bitsandbytes' own layers are not
used: they keep the type of their first input, and on some processors evaluation changes the form of a shared weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config.section import Quantization
from common.config.strategy import StrategyConfig
from common.errors import ModelError
from common.model import families

_BLOCK = 64  # weights that share a scale
_PIECE = 2**22  # weights that are quantised at once, in whole blocks: 4-bit codes take six times their memory to make


@dataclass(frozen=True)
class Held:
    """How a base model is to be held in memory.

    Attributes:
        quantization: the form of weights that nobody trains.
        strategy: the federation's strategy, whose trained base weights stay whole; None: there is no strategy.
        device: computes the codes, one weight after the other; a CPU takes minutes for each 1,000 million weights.
        as_stored: files that are quantised already are read in whatever form they have.
    """

    quantization: Quantization = "whole"
    strategy: StrategyConfig | None = None
    device: str = "cpu"
    as_stored: bool = False


WHOLE = Held()


class QuantizedLinear(nn.Linear):
    """A linear layer without gradient for its weight, which is held in codes.

    Attributes:
        quantization: form of the codes.
        dtype: type of the weight in the files, as the federation loads it.
        weight_digest: digest of that weight, hex, as ``common.protocol.digest`` computes it.
        transposed: the model's family keeps the weight as (in, out).
        weight: the codes, uint8 (out * in / 2, 1) or int8 (out, in).
    """

    weight: Tensor  # a buffer: nothing that an optimizer or a digest takes for a weight

    def __init__(
        self, old: nn.Module, shape: torch.Size, codes: dict[str, Tensor], dtype: torch.dtype, digest: str
    ) -> None:
        nn.Module.__init__(self)  # without the whole weight that nn.Linear makes
        self.out_features, self.in_features = shape
        self.quantization: Quantization = "int8" if codes["weight"].dtype == torch.int8 else "nf4"
        self.dtype, self.weight_digest, self.transposed = dtype, digest, families.is_transposed(old)
        for name, tensor in codes.items():
            self.register_buffer(name, tensor)
        bias: Any = old.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.train(old.training)

    def forward(self, input: Tensor) -> Tensor:
        """The output (..., out) for an input (..., in), in autocast's type, or in that of the input."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        x, bias = input.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Linear.apply(x, bias, self)  # type: ignore[no-any-return, no-untyped-call]
        if self.quantization == "int8":
            return functional.linear(x, self.whole(dtype), bias)
        found: Tensor = _bnb().matmul_4bit(x, self.weight, bias=bias, quant_state=self._state(dtype))
        return found

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        if self.quantization == "int8":
            scale: Any = self.scale
            return self.weight.to(dtype).mul_(scale.unsqueeze(1) / 127)
        found: Tensor = _bnb().functional.dequantize_4bit(self.weight, self._state(dtype))
        return found

    def _state(self, dtype: torch.dtype) -> Any:  # noqa: ANN401
        bnb = _bnb().functional
        nested: dict[str, Any] = {}
        if "nested" in self._buffers:
            scales = bnb.QuantState(absmax=self.nested, code=self.nested_code, blocksize=256, dtype=torch.float32)
            nested = {"offset": self.offset, "state2": scales}
        shape = torch.Size((self.out_features, self.in_features))
        how = {"blocksize": _BLOCK, "quant_type": "nf4", "dtype": dtype}
        return bnb.QuantState(absmax=self.absmax, shape=shape, **how, **nested)


class _Linear(torch.autograd.Function):
    """x W^T + b without a gradient for W, which is made from its codes in each direction instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:  # noqa: ANN401
        """Output (..., out) for x (..., in)."""
        ctx.layer = layer
        return functional.linear(x, layer.whole(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """The gradient of x."""
        return grad @ ctx.layer.whole(grad.dtype), None, None


def quantize(weight: Tensor, quantization: Quantization, device: str = "cpu") -> dict[str, Tensor]:
    """The codes of a weight (out, in), on the CPU, by the names of a ``QuantizedLinear``'s buffers.

    They are computed on ``device``, piece by piece, to save memory.
    """
    weight = weight.to(device)
    codes = _int8(weight) if quantization == "int8" else _nf4(weight)
    return {name: tensor.cpu() for name, tensor in codes.items()}


def _int8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1).float()  # (out,)
    rows = max(1, _PIECE // weight.shape[1])
    steps = (127 / scale.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)
    pieces = zip(weight.split(rows), steps.split(rows), strict=True)
    return {"weight": torch.cat([(w.float() * s).round_().to(torch.int8) for w, s in pieces]), "scale": scale}


def _nf4(weight: Tensor) -> dict[str, Tensor]:
    bnb = _bnb().functional
    found = [bnb.quantize_4bit(p, blocksize=_BLOCK, quant_type="nf4") for p in weight.reshape(-1).split(_PIECE)]
    absmax = torch.cat([state.absmax for _, state in found])
    offset = absmax.mean()
    scales, nested = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    own = {"nested": nested.absmax, "nested_code": nested.code, "offset": offset}
    return {"weight": torch.cat([codes for codes, _ in found]), "absmax": scales, **own}


def shapes_of_codes(shape: torch.Size, quantization: Quantization) -> dict[str, Tensor]:
    """Tensors of the form that ``quantize`` gives for a weight of this shape, without its values."""
    if quantization == "int8":
        return {"weight": torch.empty(shape, dtype=torch.int8), "scale": torch.empty(shape[0])}
    blocks = -(-shape.numel() // _BLOCK)
    codes = {"weight": torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8)}
    codes |= {"absmax": torch.empty(blocks, dtype=torch.uint8), "nested": torch.empty(-(-blocks // 256))}
    return {**codes, "nested_code": torch.empty(256), "offset": torch.empty(())}


def _bnb() -> Any:  # noqa: ANN401
    """The package bitsandbytes, which has no types; imported at its first use."""
    import bitsandbytes

    return bitsandbytes


def check_installed(quantization: Quantization) -> None:
    """Raise a ModelError when weights in this form need bitsandbytes, and it is not installed."""
    if quantization != "nf4":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            "`model.quantization` nf4 needs bitsandbytes at the server and at every site: "
            "`make setup` installs it, and an image has it with --build-arg EXTRAS=8bit; without it: whole or int8"
        ) from None


def untrained(model: Any, held: Held) -> list[str]:  # noqa: ANN401 - of transformers
    """Paths of the linear layers that are held in codes: those that nobody trains, without heads and embeddings.

    A layer keeps its weight where the strategy changes the weight, where another module has the same weight, and where
    the weight makes the model's output.

    Raises:
        ModelError: there are none.
    """
    strategy = held.strategy
    trained: set[str] = set()
    if strategy is not None and strategy.changes_base:
        trained = {layer.name for layer in families.select(model, strategy.modules, strategy.blocks)}
    output = model.get_output_embeddings()
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    layers = [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or families.is_transposed(module))
        and module is not output
        and not families.in_head(name)
        and name not in trained
        and owners[id(module.weight)] == 1
        and f"{name}.weight" not in tied
    ]
    if not layers:
        why = f"`strategy` {strategy.name} changes them all" if trained and strategy else "it has no others"
        raise ModelError(
            f"`model.quantization` {held.quantization} holds the linear layers in the blocks of this "
            f"{families.kind_of(model)} model that nobody trains, of which there are none: {why}; allowed for it: whole"
        )
    return layers


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The layers that are held in codes, by their path."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


def is_quantized(model: nn.Module) -> bool:
    """Whether a model holds any weight in codes."""
    return next(quantized_layers(model), None) is not None


def whole_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Number of weights, and bytes of a weight, of all parameters, as if all were whole."""
    yield from ((p.numel(), p.element_size()) for p in model.parameters())
    for _, layer in quantized_layers(model):
        yield layer.in_features * layer.out_features, layer.dtype.itemsize


def replace(model: nn.Module, name: str, weight: Tensor, codes: dict[str, Tensor], digest: str) -> None:
    """Put a layer in codes into the place of the layer ``name``; ``weight``: (out, in), its shape and type count."""
    model.set_submodule(name, QuantizedLinear(model.get_submodule(name), weight.shape, codes, weight.dtype, digest))
