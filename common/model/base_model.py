"""Load the base model and its tokenizer from a folder or a pinned hub revision, and believe what the loader reports."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config.federation import Dtype
from common.errors import FedSpanError, ModelError
from common.model.families import kind_of
from common.model.model_files import arrange, check_files, check_report, check_tokens, draw_new
from common.model.quantization import WHOLE, Held
from common.protocol.digest import base_digest

_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")  # tables of learned positions

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Base:
    """A base model in memory, with its tokenizer; a vision model's ``tokenizer`` is its image processor.

    ``head`` tells in words where a classifier's head is from.
    """

    model: nn.Module
    tokenizer: Any
    head: str


def load_base(
    source: str,
    revision: str | None,
    dtype: Dtype,
    *,
    auto_class: str,
    processor: str,
    labels: list[str],
    seed: int,
    held: Held = WHOLE,
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
        held: how weights that nobody trains are held; they are quantised one by one as they are read.

    Raises:
        ModelError: the folder is absent, or holds no model that transformers can read, or not all of one; the tokenizer
            is another model's; the rows of a finished head cannot be told apart; or the weights cannot be ``held`` so.
    """
    import transformers as hf
    from transformers.utils import logging

    from common.model.quantized_loading import check_stored, on_the_fly, take_stored

    if revision is None:
        check_files(Path(source))
    logging.disable_progress_bar()
    where: dict[str, Any] = {"local_files_only": True} if revision is None else {"revision": revision}
    images = processor == "AutoImageProcessor"  # one library for the pixels, so that all sites see the same
    names = dict(enumerate(labels))
    own = {"id2label": names, "label2id": {label: i for i, label in names.items()}} if labels else {}

    def read(**kwargs: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
        how = {"dtype": TORCH_DTYPES[dtype], "ignore_mismatched_sizes": True, "output_loading_info": True}
        if held.quantization != "whole" and not stored:
            how["quantization_config"] = on_the_fly(held)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = getattr(hf, auto_class).from_pretrained(source, **how, **where, **kwargs)
        return model, report

    try:
        config = hf.AutoConfig.from_pretrained(source, **where)
        stored = check_stored(source, config, held)
        tokenizer = getattr(hf, processor).from_pretrained(source, **where, **({"backend": "pil"} if images else {}))
        model, report = read(**own)
        if labels and not images:  # a decoder finds a row's last token by it
            model.config.pad_token_id = pad_id(tokenizer)
    except FedSpanError:
        raise
    except Exception as error:  # noqa: BLE001 - loaders raise anything, and their text is of the model alone
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"model {source} cannot be loaded: {what}") from None
    if stored:
        take_stored(model, TORCH_DTYPES[dtype])
    finished = check_report(source, model, report, classifies=bool(labels))
    draw_new(model, report, seed)
    if not images:
        check_tokens(source, model, tokenizer)
    head = arrange(model, config.id2label, labels, seed, lambda: read()[0]) if labels and finished else "new"
    model.train(False)
    return Base(model, tokenizer, head)


def read_again(read: Callable[[], Base], digest: str) -> Base:
    """Read a base model anew, to write a finished model with whole weights.

    Args:
        read: reads it.
        digest: digest of the base model that training began with, hex.

    Raises:
        ModelError: the files now hold other weights.
    """
    base = read()
    if (found := base_digest(base.model)) != digest:
        raise ModelError(
            f"the base model's files have changed since training began: digest {found}, at the beginning {digest}; "
            "put the files back"
        )
    return base


def check_length(model: Any, max_length: int) -> None:  # noqa: ANN401
    """Raise a ModelError when rows of ``max_length`` tokens are longer than the model's table of positions."""
    if model.main_input_name != "input_ids":
        return
    words = model.get_input_embeddings()
    beside = next((module for module in model.modules() if any(child is words for child in module.children())), model)
    for name, table in beside.named_children():  # a table elsewhere is of images
        if not isinstance(table, nn.Embedding) or not _POSITIONS.search(name):
            continue
        unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
        most = table.num_embeddings - unused
        if max_length > most:
            raise ModelError(
                f"`training.max_length` is {max_length}, but this {kind_of(model)} model has {most} positions; "
                f"allowed: up to {most}"
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
