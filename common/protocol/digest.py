"""SHA-256 digests, by which two machines check that they hold the same tensors, base model and tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PINNED_DATE = "2026-01-01"  # given to chat templates that print today's date, on every day and at every site


def tensor_digest(tensor: Tensor) -> str:
    """Digest of dtype, shape and bytes (hex)."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
    if value.numel():
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of named tensors (hex); the order of the names does not matter."""
    return _of_lines({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def _of_lines(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def base_digest(model: nn.Module) -> str:
    """Digest of a base model's parameters (hex); tied parameters count once.

    The digest covers the loaded tensors: dtype, shapes and values matter, file layout and sharding do not.
    """
    found = {name: tensor_digest(parameter) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(told := getattr(module, "weight_digest", None), str):  # held in codes: the digest of the files'
            found[f"{name}.weight"] = told
    return _of_lines(found)


def tokenizer_digest(tokenizer: Any) -> str:  # noqa: ANN401 - transformers' tokenizers share no useful type
    """Digest of everything that decides how text becomes tokens: pipeline, special tokens, chat template (hex).

    For an image processor: the digest of the processor's settings.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = repr(sorted(tokenizer.special_tokens_map.items()))
    template = tokenizer.chat_template or ""  # several, by name, of some tokenizers
    written = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    dated = [PINNED_DATE] if "strftime_now" in written else []
    text = "\x00".join([pipeline, special, written, *dated])
    return hashlib.sha256(text.encode()).hexdigest()
