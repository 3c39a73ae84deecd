"""PEFT's state-dict names: which tensor is an A, which a B, and which B belongs to which A."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from common.errors import AggregationError
from common.model.adapters import BASE_WEIGHT, LORA_A as LORA_A, LORA_B as LORA_B


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The largest LoRA rank among ``tensors``, read from their shapes; None when there is no LoRA factor."""
    ranks = [t.shape[0] for n, t in tensors.items() if n.endswith(LORA_A)]
    ranks += [t.shape[1] for n, t in tensors.items() if n.endswith(LORA_B)]
    return max(ranks, default=None)


def partner(name: str) -> str | None:
    """Name of the other LoRA factor of the same layer; None when ``name`` names no LoRA factor."""
    if name.endswith(LORA_A):
        return name.removesuffix(LORA_A) + LORA_B
    if name.endswith(LORA_B):
        return name.removesuffix(LORA_B) + LORA_A
    return None


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names (A, B) of every adapted layer.

    Raises:
        AggregationError: there is no LoRA factor, or one lacks its partner.
    """
    all_ = list(names)
    for name in all_:
        other = partner(name)
        if other is not None and other not in all_:
            raise AggregationError(f"{name} has no partner {other}")
    found = [(name, name.removesuffix(LORA_A) + LORA_B) for name in all_ if name.endswith(LORA_A)]
    if not found:
        raise AggregationError(
            f"no LoRA factor among {len(all_)} tensors; allowed: names that end in {LORA_A}, {LORA_B}"
        )
    return found


def check_state(state: Mapping[str, Tensor], stays_at_site: str | None) -> None:
    """Refuse a first state that would be averaged by wrong rules, because a factor in it is not known as one.

    Args:
        state: by name.
        stays_at_site: "B" where the strategy leaves B to the clients.

    Raises:
        AggregationError: a factor has another name or more dimensions than a linear layer's, or lacks its partner.
    """
    for name, tensor in state.items():
        if any(part.startswith("lora_") for part in name.split(".")) and partner(name) is None:
            raise AggregationError(
                f"{name} is no factor that can be combined; allowed: names that end in {LORA_A}, {LORA_B}, as "
                "peft.get_peft_model_state_dict gives them, of linear layers without DoRA"
            )
        if partner(name) is not None and tensor.dim() != 2:
            raise AggregationError(f"{name} has shape {tuple(tensor.shape)}; allowed: factors of linear layers, 2-D")
    if stays_at_site is None:
        for a, b in pairs(state):
            if state[a].shape[0] != state[b].shape[1]:
                raise AggregationError(
                    f"{a} {tuple(state[a].shape)} and {b} {tuple(state[b].shape)} are of different rank"
                )


def layers(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """The names (A, B, base weight) of every adapted layer.

    Raises:
        AggregationError: there is no LoRA factor, or one lacks its partner or its base weight.
    """
    all_ = set(names)
    found = [(a, b, a.removesuffix(LORA_A) + BASE_WEIGHT) for a, b in pairs(sorted(all_))]
    for a, _, weight in found:
        if weight not in all_:
            raise AggregationError(f"{a} has no base weight {weight}, which the strategy changes")
    return found
