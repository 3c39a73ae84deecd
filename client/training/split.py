"""One model over several devices, for a model that fits no single one (decision 037). No Flower.

Each device holds a run of blocks. The first device has all that comes before the blocks, the last all that comes after
them. A step goes through the devices one after the other, so a model is split for its size, not for speed.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from common.errors import ModelError
from common.model.families import blocks_of, kind_of

Places = dict[str, torch.device]  # the device of each part of a model, by path, in the model's order


def free_bytes(devices: Sequence[torch.device]) -> list[int]:
    """Bytes that are free on each CUDA device."""
    return [torch.cuda.mem_get_info(device)[0] for device in devices]


def places(model: nn.Module, devices: Sequence[torch.device], room: Sequence[int], beside: Mapping[int, int]) -> Places:
    """Lay a model's blocks over devices, so that as much memory as can be stays free on the fullest one.

    Args:
        model: the model, prepared for training, on any device.
        devices: where the model is to be.
        room: bytes that each device has.
        beside: bytes that a parameter needs beside its own, by the parameter's id: its optimizer's state.

    Raises:
        ModelError: the model has fewer blocks than there are devices.
    """
    blocks = [path for path, _ in blocks_of(model)]
    if len(blocks) < len(devices):
        raise ModelError(
            f"`split` is over {len(devices)} devices, but this {kind_of(model)} model has {len(blocks)} block(s); "
            f"allowed: `devices` 2 to {len(blocks)}"
        )
    parts = list(_parts(model, "", set(blocks)))
    first, last = parts.index(blocks[0]), parts.index(blocks[-1])
    at, sizes, spare, seen = dict[str, int](), dict[str, int](), list(room), set[int]()
    for number, path in enumerate(parts):
        module = model.get_submodule(path)
        weights = {id(parameter) for parameter in module.parameters()}
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in seen}
        sizes[path] = sum(tensor.nbytes + beside.get(key, 0) for key, tensor in tensors.items())
        if number < first or number > last:
            # Not what is tied to an earlier part, nor a table of positions, which every block is given.
            at[path] = len(devices) - 1 if number > last and weights and not weights & seen else 0
            spare[at[path]] -= sizes[path]
        seen |= tensors.keys()
    ends, done = _ends([sizes[path] for path in blocks], spare), 0
    for path in parts[first : last + 1]:  # with whatever lies between blocks
        done += path in blocks
        at[path] = sum(end < done for end in ends)
    return {path: devices[at[path]] for path in parts}


def _parts(module: nn.Module, prefix: str, blocks: set[str]) -> Iterator[str]:
    """Paths of the blocks, and of the outermost modules that are in none and hold tensors."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(block.startswith(f"{path}.") for block in blocks):
            yield from _parts(child, f"{path}.", blocks)
        elif path in blocks or next(child.parameters(), next(child.buffers(), None)) is not None:
            yield path


def _ends(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Number of the block behind each device's last one: the runs that leave most room where least is left."""
    before = [0, *accumulate(sizes)]

    @cache
    def best(start: int, device: int) -> tuple[int, tuple[int, ...]]:
        if device == len(room) - 1:
            return room[device] - before[-1] + before[start], (len(sizes),)
        found = []
        for end in range(start + 1, len(sizes) - len(room) + device + 2):
            left, ends = best(end, device + 1)
            found.append((min(room[device] - before[end] + before[start], left), (end, *ends)))
        return max(found)

    return list(best(0, 0)[1])


def split(model: nn.Module, where: Places) -> None:
    """Move each part of a model to its device; from now on, inputs follow by themselves.

    accelerate's ``dispatch_model`` would put new parameters in the places of those that a strategy has chosen, and
    bring the logits back to the first device.
    """
    first = next(iter(where.values()))
    for path, module in model.named_modules():
        if any(part.startswith(f"{path}." if path else "") for part in where):  # holds parts
            module._apply(partial(_to, first), recurse=False)
    for path, device in where.items():
        module = model.get_submodule(path)
        module.to(device)
        module.register_forward_pre_hook(partial(_bring, device), with_kwargs=True)
    blocks = [(path, where[path]) for path, _ in blocks_of(model)]
    for (path, device), (_, following) in pairwise(blocks):
        # Already here: with checkpointing, the next block's random numbers are kept for the device of its inputs.
        if device != following:
            model.get_submodule(path).register_forward_hook(partial(_pass_on, following))


def _to(device: torch.device, value: Any) -> Any:  # noqa: ANN401
    return value.to(device) if isinstance(value, Tensor) and value.device != device else value


def _bring(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    del module
    return tree_map_only(Tensor, partial(_to, device), (args, kwargs))


def _pass_on(device: torch.device, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ANN401
    del module, args
    return tree_map_only(Tensor, partial(_to, device), output)
