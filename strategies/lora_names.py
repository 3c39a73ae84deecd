"""PEFT's state-dict names: which tensor is an A, which a B, and which B belongs to which A."""

from collections.abc import Mapping

from torch import Tensor

LORA_A = ".lora_A.weight"  # (rank, in)
LORA_B = ".lora_B.weight"  # (out, rank)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The largest LoRA rank among ``tensors``, read from their shapes; None when there is no LoRA factor."""
    ranks = [t.shape[0] for n, t in tensors.items() if n.endswith(LORA_A)]
    ranks += [t.shape[1] for n, t in tensors.items() if n.endswith(LORA_B)]
    return max(ranks, default=None)
