"""Named tensors; and groups of named tensors, flattened to one set of names for files and records."""

from collections.abc import Mapping

from torch import Tensor

Tensors = dict[str, Tensor]
_SEPARATOR = "|"  # a group's name must not hold it; a tensor's name may


def flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """Flatten groups of tensors to one mapping with names ``<group>|<name>``."""
    return {f"{group}{_SEPARATOR}{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """The inverse of ``flatten``; a name without separator becomes a group that holds one tensor, named ""."""
    groups: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(_SEPARATOR)
        groups.setdefault(group, {})[name] = tensor
    return groups
