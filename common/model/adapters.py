"""LoRA adapters by PEFT's names: scaling, cutting to a smaller rank, new factors; for the server and every site."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.linalg.subspace import generator_for

LORA_A = ".lora_A.weight"  # (rank, in)
LORA_B = ".lora_B.weight"  # (out, rank)
FACTORS = {"A": LORA_A, "B": LORA_B}
BASE_WEIGHT = ".base_layer.weight"  # (out, in), the frozen weight under an adapter


def scaling(lora_alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor s in W + s B A: lora_alpha / rank, or lora_alpha / sqrt(rank)."""
    return lora_alpha / (rank**0.5 if rslora else rank)


def fresh_a(seed: int, server_round: int, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A new A (rank, in) for a round: uniform in +-1/sqrt(in), like PEFT's; float32, on the CPU."""
    drawn = torch.rand(*shape, generator=generator_for(seed, server_round, name))
    return drawn.mul_(2.0).sub_(1.0).div_(shape[1] ** 0.5)


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Cut every A (R, in) to its first ``rank`` rows, every B (out, R) to its first ``rank`` columns."""
    return {
        name: tensor[:rank] if name.endswith(LORA_A) else tensor[:, :rank] if name.endswith(LORA_B) else tensor
        for name, tensor in tensors.items()
    }
