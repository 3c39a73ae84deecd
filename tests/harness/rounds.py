"""States, updates and float64 arithmetic that the tests of all rules share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from strategies.rule import RoundResult, Rule, Tensors, Update

LAYERS = {"model.layers.0.q_proj": (6, 5), "model.layers.0.up_proj": (9, 5), "model.layers.1.q_proj": (6, 6)}  # out, in
HEAD = "classifier.weight"
ALPHA = 16.0
Arrays = dict[str, np.ndarray]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def lora(rank: int, seed: int, *, head: bool = True, dtype: torch.dtype = torch.float32) -> Tensors:
    """Factors of this rank for every layer."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (out, in_) in LAYERS.items():
        tensors[f"{layer}.lora_A.weight"] = normal(g, rank, in_)
        tensors[f"{layer}.lora_B.weight"] = normal(g, out, rank)
    if head:
        tensors[HEAD] = normal(g, 3, 5)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def base_weights(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Of every layer, as the strategies that change them name them."""
    g = torch.Generator().manual_seed(seed)
    return {f"{layer}.base_layer.weight": normal(g, *shape).to(dtype) for layer, shape in LAYERS.items()}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Base weights, as FedFTG trains them."""
    g = torch.Generator().manual_seed(seed)
    return {f"{layer}.weight": normal(g, *shape).to(dtype) for layer, shape in LAYERS.items()}


def trained(rule: Rule, server_round: int, state: Tensors, seed: int, size: float = 0.3) -> Tensors:
    """What a client that moved by noise of this size sends in a round."""
    g = torch.Generator().manual_seed(seed)
    active = rule.active(server_round, state)
    return {name: state[name] + (size * normal(g, *state[name].shape)).to(state[name].dtype) for name in active}


def aggregate(rule: Rule, server_round: int, state: Tensors, updates: Sequence[Update]) -> RoundResult:
    return rule.aggregate(server_round, state, iter(updates))


def doubles(tensors: Tensors) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def weighted_mean(arrays: Sequence[np.ndarray], examples: Sequence[int]) -> np.ndarray:
    return sum(n * a for n, a in zip(examples, arrays, strict=True)) / sum(examples)  # type: ignore[return-value]


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-6) -> bool:
    """Relative in the Frobenius norm."""
    return bool(np.linalg.norm(got - want) <= tolerance * max(float(np.linalg.norm(want)), 1e-30))


def product(tensors: Tensors, layer: str, scaling: float = 1.0) -> np.ndarray:
    factors = doubles(tensors)
    return scaling * factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]  # type: ignore[no-any-return]


def effective(tensors: Tensors, layer: str, scaling: float) -> np.ndarray:
    """W + s B A."""
    return doubles(tensors)[f"{layer}.base_layer.weight"] + product(tensors, layer, scaling)  # type: ignore[no-any-return]


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]  # type: ignore[no-any-return]
