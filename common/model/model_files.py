"""Checks of a model's files and of the loader's report: files that are not real, weights that are missing.

A finished classifier's head gets its rows in the order of the federation's labels, by name and never by position.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.linalg.subspace import generator_for
from common.model.families import blocks_of, head_modules, in_head
from common.system.files import is_lfs_pointer

_NAMELESS = re.compile(r"LABEL_\d+")  # transformers' name for a class without a name
_READ = (".json", ".jinja", ".model", ".txt")  # files of a tokenizer or processor
_WRAPPERS = ("_orig_mod.", "module.", "model.")  # in names that torch.compile, DataParallel and transformers prefix


def check_files(folder: Path) -> None:
    """Look whether all files of a model's folder are there and whole, as far as that is seen without loading them.

    Raises:
        ModelError: names the file that is missing, damaged or a pointer; or the folder holds no model.
    """
    if not (folder / "config.json").is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise ModelError(f"model folder {folder} {what}; it must be a folder written by save_pretrained")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model folder {folder} holds a PEFT adapter; merge it into its base model first")
    for file in folder.iterdir():
        if file.suffix in _READ:
            _not_a_pointer(file)
    for name, tensors in _weights(folder).items():
        if not (folder / name).exists():
            raise ModelError(f"{folder / name} does not exist")
        _not_a_pointer(folder / name)
        if name.endswith(".safetensors") and (missing := tensors - _tensors(folder / name)):
            raise ModelError(f"{folder / name} lacks {len(missing)} tensor(s), e.g. {min(missing)}")


def _weights(folder: Path) -> dict[str, set[str]]:
    """The weight files that are read, with the tensors that an index says are in them."""
    kind, ending = ("*", "safetensors") if any(folder.glob("*.safetensors*")) else ("pytorch_model*", "bin")
    wanted = {file.name: set[str]() for file in folder.glob(f"{kind}.{ending}")}
    for index in folder.glob(f"{kind}.{ending}.index.json"):
        wanted = {}
        try:
            for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                wanted.setdefault(name, set()).add(tensor)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{index} is damaged or cut off") from None
    return wanted


def _not_a_pointer(file: Path) -> None:
    if is_lfs_pointer(file):
        raise ModelError(f"{file} is a Git-LFS pointer, not the file itself; run: git -C {file.parent} lfs pull")


def _tensors(file: Path) -> set[str]:
    """Names of the tensors in a file whose end is there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError):
        raise ModelError(f"{file} is damaged or cut off") from None


def check_report(source: str, model: nn.Module, report: dict[str, Any], *, classifies: bool) -> bool:
    """Hold the model against what its loader reports of the files; whether they hold a head, of whatever size.

    Args:
        source: for the error.
        model: as it was loaded.
        report: transformers' ``output_loading_info``.
        classifies: the head may be new, and with it the pooler below it.

    Raises:
        ModelError: a tensor of the model is not in the files, or has another shape there; or the files hold blocks that
            the model has no place for.
    """
    absent = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
    new = {name for name in absent if classifies and (in_head(name) or ".pooler." in name)}
    spare = [name for name in report["unexpected_keys"] if _of_blocks(name, model)]
    shapes = [f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in report["mismatched_keys"]]
    shapes = [text for text in shapes if text.split()[0] not in new]
    if lost := absent - new:
        what = f"{len(lost)} of {len(model.state_dict())} tensors of the model are not in its files ({_some(lost)})"
        if shapes:
            what = f"{len(shapes)} tensor(s) have another shape in its files than config.json says ({_some(shapes)})"
        hint = f"; the files name {len(spare)} that the model does not have ({_some(spare)})" if spare else ""
        raise ModelError(f"model {source}: {what}{hint}; take its files and config.json from one place")
    if spare:
        raise ModelError(
            f"model {source}: its files hold {len(spare)} tensor(s) of blocks that the model does not have "
            f"({_some(spare)}); take its files and config.json from one place"
        )
    if report["error_msgs"]:
        raise ModelError(f"model {source} cannot be loaded: {' '.join(map(str, report['error_msgs']))[:300]}")
    return bool(head_modules(model)) and not any(in_head(name) for name in report["missing_keys"])


def _of_blocks(name: str, model: nn.Module) -> bool:
    """Whether a tensor in the files belongs to the model's blocks, be it by a name with other prefixes."""
    try:
        blocks = blocks_of(model)
    except ModelError:
        return False
    lists = {_bare(path.rpartition(".")[0], model) for path, _ in blocks}
    bare = _bare(name, model)
    return any(bare.startswith(f"{path}.") and bare[len(path) + 1 :][:1].isdigit() for path in lists)


def _bare(name: str, model: nn.Module) -> str:
    """A name without the prefixes that say nothing of the place."""
    prefixes = (*_WRAPPERS, f"{getattr(model, 'base_model_prefix', 'model')}.")
    while prefix := next((p for p in prefixes if p != "." and name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def check_tokens(source: str, model: Any, tokenizer: Any) -> None:  # noqa: ANN401
    """Raise a ModelError when a tokenizer gives numbers that the model's embeddings do not have.

    A token that stands for an image or a sound, which no text becomes, may be beyond them (Gemma 3 of one size).
    """
    places = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("image", "audio", "video", "boi", "eoi")}
    highest = max((number for number in tokenizer.get_vocab().values() if number not in places), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ModelError(
            f"model {source}: the tokenizer gives numbers up to {highest}, the model has embeddings up to {rows - 1}; "
            "resize the embeddings, or take the tokenizer that belongs to the model"
        )


def arrange(model: Any, names: Mapping[int, str], labels: list[str], seed: int, original: Callable[[], Any]) -> str:  # noqa: ANN401
    """Put the rows of the last layer of a head in the order of ``labels``; draw those of labels that it did not know.

    Args:
        model: a classifier with as many outputs as ``labels``.
        names: names of the classes of the head in the files, by row.
        labels: the federation's labels.
        seed: seed of new rows.
        original: loads the model with the head of the files, which has another number of rows than ``model``'s.

    Returns:
        The changes to the head, in words.

    Raises:
        ModelError: the head's classes have no names, so that nobody can tell which label is which row.
    """
    rows = {name.strip().casefold(): row for row, name in names.items()}
    known = [rows.get(label.strip().casefold()) for label in labels]
    if known == list(range(len(names))):
        return "the files' own"
    if len(names) != len(labels) and not any(row is not None for row in known):
        return f"new; the files' own tells {len(names)} other classes apart"
    if all(_NAMELESS.fullmatch(name) for name in names.values()):
        raise ModelError(
            f"the model's head is finished, but its {len(names)} classes have no names (LABEL_0, ...), so that nobody "
            f"can tell which is which of {labels}; write the names into `id2label` of its config.json"
        )
    source = model if len(names) == len(labels) else original()
    for (name, layer), (_, old) in zip(_outputs(model), _outputs(source), strict=True):
        weight, bias = old.weight.detach().clone(), None if old.bias is None else old.bias.detach().clone()
        new = drawn(model, name, layer.weight.shape, seed)
        with torch.no_grad():
            layer.weight.copy_(_rows(new, weight, known))
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(_rows(torch.zeros(len(labels)), bias, known))
    kept = sum(row is not None for row in known)
    return f"{kept} of {len(labels)} labels have a row in the files' own, by name; new: {len(labels) - kept}"


def drawn(model: Any, name: str, shape: torch.Size, seed: int) -> Tensor:  # noqa: ANN401
    """New weights of a head: mean 0, the model's own ``initializer_range`` as deviation; float32.

    They are uniform, in one rounding a number: normal ones have other last bits on other processors, and with these
    another digest of the base model.
    """
    width = 2 * math.sqrt(3) * float(getattr(model.config, "initializer_range", None) or 0.02)
    return (torch.rand(shape, generator=generator_for(seed, 0, name)) - 0.5) * width


def draw_new(model: Any, report: Mapping[str, Any], seed: int) -> None:  # noqa: ANN401
    """Draw the matrices that the files lack, which transformers has drawn, anew: the same on every processor."""
    new = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in new and parameter.dim() > 1:
                parameter.copy_(drawn(model, name, parameter.shape, seed))


def _rows(new: Tensor, old: Tensor, known: list[int | None]) -> Tensor:
    return torch.stack([new[i].to(old.dtype) if row is None else old[row] for i, row in enumerate(known)])


def _outputs(model: Any) -> list[tuple[str, nn.Linear]]:  # noqa: ANN401
    """The layers of a head whose rows are classes, by their path."""
    found = [
        (f"{head}.{name}".rstrip("."), layer)
        for head in head_modules(model)
        for name, layer in model.get_submodule(head).named_modules()
        if isinstance(layer, nn.Linear)
    ]
    return [(name, layer) for name, layer in found if layer.out_features == model.config.num_labels][-1:]
