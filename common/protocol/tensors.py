"""Named tensors, and groups of them under one set of names, as files and records hold them."""

from collections.abc import Mapping

from torch import Tensor

Tensors = dict[str, Tensor]
_SEPARATOR = "|"  # in no group's name; a tensor's name may hold it


def flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """Groups of tensors as one, each named ``<group>|<name>``."""
    return {f"{group}{_SEPARATOR}{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """The other way round; a name without a group is in the group of that name, as the empty name."""
    groups: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(_SEPARATOR)
        groups.setdefault(group, {})[name] = tensor
    return groups
