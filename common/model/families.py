"""Model families, and the choice of the trained tensors.

Module names differ between the families of transformers, so one literal table gives, for each family, the path of its
blocks and the names of the linear layers in a block. Biases, norms, embeddings and heads are never selected.
"""

import difflib
import math
import re
from dataclasses import dataclass, replace

from torch import nn

from common.errors import ModelError, SelectionError


@dataclass(frozen=True)
class Family:
    """Module names of a model family.

    Attributes:
        blocks: the end of the path to the list of transformer blocks.
        mlp: paths, within a block, of the MLP's linear layers.
        attention: paths, within a block, of the attention's linear layers.
        unused_positions: number of entries in the table of position embeddings that no token uses; None: the family
            has no such table.
        classifies: whether the family can only classify, with a new head: it has no language-modelling head here.
    """

    blocks: str
    mlp: tuple[str, ...]
    attention: tuple[str, ...]
    unused_positions: int | None = None
    classifies: bool = False


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


_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = Family("layers", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), _QKVO)
_BERT = Family(
    "encoder.layer",
    ("intermediate.dense", "output.dense"),
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    unused_positions=0,
    classifies=True,
)
_VISION_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_SIGLIP_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_FC = ("mlp.fc1", "mlp.fc2")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Family("transformer.h", ("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj"), unused_positions=0),
    "gpt_neox": Family(
        "layers", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), ("attention.query_key_value", "attention.dense")
    ),
    "bert": _BERT,
    "roberta": replace(_BERT, unused_positions=2),
    "vit": Family("layers", _FC, _VISION_ATTENTION, classifies=True),
    "siglip": Family("vision_model.encoder.layers", _FC, _SIGLIP_ATTENTION, classifies=True),
    "siglip_vision_model": Family("encoder.layers", _FC, _SIGLIP_ATTENTION, classifies=True),
    "dinov2": Family("encoder.layer", _FC, _VISION_ATTENTION, classifies=True),
}

_HEADS = ("classifier", "score")  # names of a classifier's head in transformers

_PARTS = {"third": 3, "half": 2, "quarter": 4}
_BLOCKS_ALLOWED = "`all`, `lower third`, `lower half`, `lower quarter`, `lower N`, `0-9`, `0,2,5`"


def select(model: nn.Module, modules: str | list[str], blocks: str) -> list[SelectedLayer]:
    """The linear layers of ``model`` that a federation file names, in the model's order.

    Args:
        model: a transformers model of a known family.
        modules: ``mlp``, ``attention``, ``linear`` (both), or names: a last component (``up_proj``), the end of a path
            (``mlp.up_proj``) or a full path, with or without ``.weight``.
        blocks: ``all``, ``lower third`` (rounded up, at least one block), ``lower half``, ``lower quarter``,
            ``lower N``, ``0-9``, ``0,2,5-7``.

    Raises:
        ModelError: the family is unknown, or has no blocks where it should.
        SelectionError: nothing matches; the text lists the names that could.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = FAMILIES.get(kind)
    if family is None:
        raise ModelError(f"unknown model family {kind!r}; known: {', '.join(FAMILIES)}")
    path, count = _find_blocks(model, family, kind)
    wanted = _block_numbers(blocks, count)
    exact, ends = _module_names(modules, family)
    layers, in_block = [], []
    for name, module in model.named_modules():
        match = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", name)
        if match is None or match[2] not in family.mlp + family.attention:
            continue
        if match[1] == "0":
            in_block.append(match[2])
        if int(match[1]) in wanted and (match[2] in exact or any(_ends_with(name, end) for end in ends)):
            transposed = type(module).__name__ == "Conv1D"
            layers.append(SelectedLayer(name, f"{name}.weight", int(match[1]), transposed))
    unmatched = [end for end in (*exact, *ends) if not any(_ends_with(layer.name, end) for layer in layers)]
    if unmatched:
        near = difflib.get_close_matches(unmatched[0], in_block, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SelectionError(
            f"`modules` {unmatched[0]!r} in `blocks` {blocks!r} matches no tensor of this {kind} model{hint}; "
            f"each of its {count} blocks has: {', '.join(in_block)}"
        )
    return layers


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
    """Whether a parameter of a base model belongs to a classification head."""
    return name.partition(".")[0] in _HEADS


def _find_blocks(model: nn.Module, family: Family, kind: str) -> tuple[str, int]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _ends_with(name, family.blocks):
            return name, len(module)
    raise ModelError(f"this {kind} model keeps no list of blocks under {family.blocks!r}; is it complete?")


def _module_names(modules: str | list[str], family: Family) -> tuple[list[str], list[str]]:
    """Exact names in a block (members of a group such as ``mlp``), and ends of paths (given by the user)."""
    groups = {"mlp": family.mlp, "attention": family.attention, "linear": family.attention + family.mlp}
    names = [modules] if isinstance(modules, str) else modules
    exact = [member for name in names for member in groups.get(name, ())]
    return exact, [name for name in names if name not in groups]


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
