"""Load the base model and its tokenizer from a folder or a pinned hub revision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config.federation import Dtype
from common.errors import ModelError
from common.model.families import FAMILIES

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Base:
    """A base model in memory, with its tokenizer; for a vision model ``tokenizer`` is the image processor."""

    model: nn.Module
    tokenizer: Any


def load_base(
    source: str,
    revision: str | None,
    dtype: Dtype,
    *,
    auto_class: str,
    processor: str,
    labels: list[str],
    seed: int,
) -> Base:
    """Load the model in ``source``, in ``dtype``, on the CPU, in evaluation mode.

    Args:
        source: a local folder, or a hub id when ``revision`` is given.
        revision: commit of the hub model; None for a folder.
        dtype: type of the weights in memory.
        auto_class: name of the transformers class that loads the model.
        processor: name of the transformers class that loads the tokenizer or image processor: AutoTokenizer,
            AutoImageProcessor.
        labels: a classifier's labels; empty for other models.
        seed: seed for weights that ``source`` does not hold, such as a classifier's new head.

    Raises:
        ModelError: the folder is absent, or holds no model that transformers can read.
    """
    import transformers as hf
    from transformers.utils import logging

    if revision is None and not (Path(source) / "config.json").is_file():
        what = "holds no config.json" if Path(source).is_dir() else "does not exist"
        raise ModelError(f"model folder {source} {what}; it must be a folder written by save_pretrained")
    logging.disable_progress_bar()
    where: dict[str, Any] = {"local_files_only": True} if revision is None else {"revision": revision}
    try:
        images = processor == "AutoImageProcessor"  # always PIL: other backends give slightly different pixels
        tokenizer = getattr(hf, processor).from_pretrained(source, **where, **({"backend": "pil"} if images else {}))
        if labels:
            names = dict(enumerate(labels))
            where |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            where |= {"ignore_mismatched_sizes": True}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(hf, auto_class).from_pretrained(source, dtype=TORCH_DTYPES[dtype], **where)
        if labels and not images:  # a decoder that classifies finds a row's last token by pad_token_id
            model.config.pad_token_id = pad_id(tokenizer)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model {source} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    model.train(False)
    return Base(model, tokenizer)


def check_length(model: Any, max_length: int) -> None:  # noqa: ANN401
    """Raise a ModelError when rows of ``max_length`` tokens are longer than the model's table of positions."""
    kind = getattr(model.config, "model_type", "")
    family = FAMILIES.get(kind)
    if family is None or family.unused_positions is None:
        return
    most = model.config.max_position_embeddings - family.unused_positions
    if max_length > most:
        raise ModelError(
            f"`training.max_length` is {max_length}, but this {kind} model has {most} positions; allowed: up to {most}"
        )


def pad_id(tokenizer: Any) -> int:  # noqa: ANN401
    """The id of the padding token; the end token's id where the tokenizer has no padding token.

    Any id would do: the attention mask, not the id, marks the padding.

    Raises:
        ModelError: the tokenizer has neither.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        raise ModelError("the tokenizer has neither a padding nor an end-of-text token")
    return int(padding)
