"""Projected gradients straight from a linear layer's input: R = dY^T (x P^T), without G = dY^T x.

x (tokens, n) and dY (tokens, m) give G (m, n) at 2 tokens m n operations, a third of the layer's work where it is
trained. R (m, r) or (r, n) takes n / r or m / r times fewer. It is the same sum in another order, so equal to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence, Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.linalg.subspace import projects_right


def layers_of(model: nn.Module, weights: AbstractSet[Tensor]) -> list[nn.Linear]:
    """The layers that do nothing but multiply with one of the weights, in float32, by torch's own forward."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    return [layer for layer in layers if layer.weight in weights and layer.weight.dtype == torch.float32]


def take(state: dict[str, Any], low: Tensor) -> None:
    """Add a projected gradient, (m, r) or (r, n), to those of the step in a weight's state."""
    state["low"] = state["low"].add_(low) if "low" in state else low


@contextmanager
def directly(layers: Sequence[nn.Linear], states: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
    """A context in which a backward pass gives these layers' weights an R in their state, and no gradient.

    Args:
        layers: the layers.
        states: GaLore's state of every weight (m, n); its last basis is (r, n) or (m, r).
    """
    try:
        for layer in layers:
            layer.forward = partial(_multiplied, layer, states[layer.weight])  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _multiplied(layer: nn.Linear, state: dict[str, Any], input: Tensor) -> Tensor:
    result: Tensor = _Multiply.apply(input, layer.weight, layer.bias, state)  # type: ignore[no-untyped-call]
    return result


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: dict[str, Any]) -> Tensor:  # noqa: ANN401
        basis: Tensor = state["bases"][-1]
        ctx.state = state
        ctx.save_for_backward(weight, basis, inputs @ basis.T if projects_right(weight.shape) else inputs)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weight, basis, kept = ctx.saved_tensors
        of_inputs, _, of_bias, _ = ctx.needs_input_grad
        gradient = gradients[0].reshape(-1, len(weight))  # (tokens, m)
        left = gradient if projects_right(weight.shape) else gradient @ basis
        take(ctx.state, left.T @ kept.reshape(len(gradient), -1))
        return gradients[0] @ weight if of_inputs else None, None, gradient.sum(0) if of_bias else None, None
