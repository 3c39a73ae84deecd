"""The choice of the tensors that are trained, by a model's structure.

Blocks are the longest list of modules that hold linear layers; for a model in stages (Swin), the stages' lists, one
after the other. In a block, a linear layer with attention in its path belongs to the attention, any other to the MLP.
``SPECIAL`` names the blocks of families where that finds another list. Biases, norms, embeddings and heads are never
selected.
"""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from common.errors import ModelError, SelectionError

Block = tuple[str, nn.Module]  # by its path

#: By ``model_type``: the end of the path of the list of blocks, where it is not the one with most weights.
SPECIAL: dict[str, str] = {"gemma3": "language_model.layers"}  # text is learned; its images' encoder rests


@dataclass(frozen=True)
class SelectedLayer:
    """One selected linear layer.

    Attributes:
        name: the module's path, as in ``named_modules``.
        weight: the parameter's path, as in ``named_parameters``.
        block: number of the layer's block, from 0.
        transposed: whether the weight is stored as (in, out) instead of (out, in), as in GPT-2's ``Conv1D``.
    """

    name: str
    weight: str
    block: int
    transposed: bool


_PEFT = "base_model.model."  # before the names of the model within a PeftModel
_HEADS = ("classifier", "score", "pre_classifier", "pooler", "head")  # names of a classifier's head in transformers
_ATTENTION = re.compile(r"(^|[._])(\w*attn|\w*attention)\b")
_EXPERTS = re.compile(r"(^|\.)\w*experts\b")

_PARTS = {"third": 3, "half": 2, "quarter": 4}
_BLOCKS_ALLOWED = "`all`, `lower third`, `lower half`, `lower quarter`, `lower N`, `0-9`, `0,2,5`"


def select(model: nn.Module, modules: str | list[str], blocks: str) -> list[SelectedLayer]:
    """The linear layers of ``model`` that a federation file names, in the model's order.

    Args:
        model: a transformers model.
        modules: ``mlp``, ``attention``, ``linear`` (both), or names: a last component (``up_proj``), the end of a path
            (``mlp.up_proj``) or a full path, with or without ``.weight``.
        blocks: ``all``, ``lower third`` (rounded up, at least one block), ``lower half``, ``lower quarter``,
            ``lower N``, ``0-9``, ``0,2,5-7``.

    Raises:
        ModelError: the model has no blocks of linear layers, or its MLP is a mixture of experts.
        SelectionError: nothing matches; says what could.
    """
    kind, found = kind_of(model), blocks_of(model)
    numbers = _block_numbers(blocks, len(found))
    unmatched = [modules] if isinstance(modules, str) else list(modules)
    wanted, layers = list(unmatched), []
    for number, (path, block) in enumerate(found):
        if number not in numbers:
            continue
        experts = next((name for name, _ in block.named_modules() if _EXPERTS.search(name)), None)
        if experts is not None and {"mlp", "linear"} & set(wanted):
            raise ModelError(
                f"this {kind} model is a mixture of experts ({path}.{experts}), which are not trained here; allowed "
                "for it: `modules: attention`, or names of its other layers"
            )
        for name, layer in linear_layers(block):
            hits = [w for w in wanted if w in ("linear", group_of(name)) or _ends_with(f"{path}.{name}", w)]
            if not hits or _EXPERTS.search(name):
                continue
            unmatched = [w for w in unmatched if w not in hits]
            transposed = is_transposed(layer) or getattr(layer, "transposed", False)
            layers.append(SelectedLayer(f"{path}.{name}", f"{path}.{name}.weight", number, transposed))
    if unmatched:
        in_block = [name for name, _ in linear_layers(found[0][1])]
        near = difflib.get_close_matches(unmatched[0], in_block, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SelectionError(
            f"`modules` {unmatched[0]!r} in `blocks` {blocks!r} matches no tensor of this {kind} model{hint}; "
            f"each of its {len(found)} blocks has: {', '.join(in_block)}"
        )
    return layers


def kind_of(model: nn.Module) -> str:
    """The name of the model's family in transformers."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def blocks_of(model: nn.Module) -> list[Block]:
    """The model's transformer blocks, from the lowest up.

    Raises:
        ModelError: there are none.
    """
    kind, lists = kind_of(model), list(_lists(model, ""))
    if end := SPECIAL.get(kind):
        lists = [blocks for blocks in lists if _ends_with(blocks[0][0].rpartition(".")[0], end)] or lists
    if not lists:
        raise ModelError(f"this {kind} model has no list of blocks with linear layers; take a transformer")
    return max(lists, key=_size)


def linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in a block by their path in it; of a mixture of experts also those of its experts."""
    return ((name, module) for name, module in block.named_modules() if _is_linear(module))


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer's family keeps weights as (in, out), as GPT-2 does."""
    return type(module).__name__ == "Conv1D"


def group_of(name: str) -> str:
    """To which group a linear layer belongs by its path in a block."""
    return "attention" if _ATTENTION.search(name) else "mlp"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _size(blocks: list[Block]) -> int:
    return sum(parameter.numel() for _, block in blocks for parameter in block.parameters())


def _lists(module: nn.Module, prefix: str) -> Iterator[list[Block]]:
    """The outermost lists of blocks below ``module``; a list of stages gives the blocks in its stages."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        members = [(f"{path}.{i}", member) for i, member in child.named_children()]
        if (
            isinstance(child, nn.ModuleList | nn.Sequential)
            and not _EXPERTS.search(path)
            and members
            and all(not _is_linear(member) and any(linear_layers(member)) for _, member in members)
        ):
            inner = [block for at, member in members for blocks in _lists(member, f"{at}.") for block in blocks]
            yield inner if 2 * _size(inner) > _size(members) else members
        else:
            yield from _lists(child, f"{path}.")


def freeze_all_but(model: nn.Module, layers: list[SelectedLayer]) -> dict[str, nn.Parameter]:
    """Freeze every parameter but the selected weights; return the selected weights by name, in the model's order.

    Raises:
        SelectionError: a selected weight is tied to another tensor, so training would change both.
    """
    names = {layer.weight for layer in layers}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    trained = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(False)
        if name in names:
            if len(owners[id(parameter)]) > 1:
                raise SelectionError(
                    f"{name} is tied to {', '.join(set(owners[id(parameter)]) - {name})}; select neither"
                )
            trained[name] = parameter
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def in_head(name: str) -> bool:
    """Whether a parameter of a base model, or of PEFT's around it, belongs to a classification head."""
    return name.removeprefix(_PEFT).partition(".")[0] in _HEADS


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules of a model's classification head that hold weights."""
    heads = [(name, module) for name, module in model.named_children() if name in _HEADS]
    return [name for name, module in heads if next(module.parameters(), None) is not None]


def _ends_with(path: str, end: str) -> bool:
    end = end.removesuffix(".weight")
    return path == end or path.endswith(f".{end}")


def _block_numbers(blocks: str, count: int) -> set[int]:
    text = blocks.strip().lower()
    if text == "all":
        return set(range(count))
    if lower := re.fullmatch(r"lower (third|half|quarter|[1-9]\d*)", text):
        share = lower[1]
        size = math.ceil(count / _PARTS[share]) if share in _PARTS else int(share)
        if size > count:
            raise SelectionError(f"`blocks` {blocks!r}: this model has {count} blocks")
        return set(range(size))
    wanted: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise SelectionError(f"`blocks` {blocks!r} is not readable; allowed: {_BLOCKS_ALLOWED}")
        if int(span[2] or span[1]) >= count:
            raise SelectionError(f"`blocks` {blocks!r}: this model has {count} blocks, 0 to {count - 1}")
        wanted |= set(range(int(span[1]), int(span[2] or span[1]) + 1))
    return wanted
