"""Checks of the site's base model: complete files, known family, right digests, trained tensors."""

import json
from collections.abc import Iterable
from pathlib import Path

from client.preflight.context import Subject
from client.preflight.finding import Finding
from common.errors import ModelError
from common.model.base_model import check_length
from common.model.families import FAMILIES


def files(subject: Subject) -> Finding:
    """All files of the model's weights exist and are complete."""
    source, revision = subject.source
    if revision is not None:
        return Finding("ok", f"{source} at {revision}, from the hub's cache or the hub")
    folder = Path(source)
    indices = list(folder.glob("*.safetensors.index.json"))
    wanted = {file.name: set[str]() for file in folder.glob("*.safetensors")}
    if indices:
        wanted = {}
        for tensor, name in json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].items():
            wanted.setdefault(name, set()).add(tensor)
    for name, tensors in wanted.items():
        missing = tensors - _tensors(folder / name)
        if missing:
            raise ModelError(f"{folder / name} lacks {len(missing)} tensor(s), e.g. {min(missing)}")
    model = subject.base.model
    return Finding("ok", f"{folder}, {len(wanted)} weight file(s), {_count(p.numel() for p in model.parameters())}")


def _tensors(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file; a file that was cut off is an error."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except SafetensorError:
        raise ModelError(f"{file} is damaged or cut off") from None


def family(subject: Subject) -> Finding:
    """The model's family is one that the choice of trained tensors knows."""
    kind = str(getattr(getattr(subject.base.model, "config", None), "model_type", "unknown"))
    if kind not in FAMILIES:
        return Finding(
            "FAIL", f"family {kind!r} is not known", f"take a model of a known family: {', '.join(FAMILIES)}"
        )
    return Finding("ok", kind)


def digests(subject: Subject) -> Finding:
    """Digests of base model and tokenizer: those in the federation file, and those that the server compares."""
    named = subject.federation.model if subject.federation is not None else None
    if named is not None and (wrong := named.difference(*subject.digests)) is not None:
        raise ModelError(wrong)
    model, tokenizer = (digest[:16] for digest in subject.digests)
    dtype = str(next(subject.base.model.parameters()).dtype).removeprefix("torch.")
    told = "those of the federation file" if named and named.digest else "the server compares them with its own"
    return Finding("ok", f"model {model} ({dtype}), tokenizer {tokenizer}; {told}")


def selection(subject: Subject) -> Finding:
    """The tensors that are trained and sent."""
    settings, tuned = subject.settings, subject.tuned
    check_length(subject.base.model, settings.training.max_length)
    text = f"{len(tuned.parameters)} tensors, {_count(p.numel() for p in tuned.parameters.values())}"
    text += f" of {_count(p.numel() for p in tuned.model.parameters())}"
    if tuned.local:
        text += f"; {len(tuned.local)} more stay here"
    return Finding("ok", f"{settings.strategy.name} trains {text}")


def _count(numbers: Iterable[int]) -> str:
    total = sum(numbers)
    return f"{total / 1e6:.1f} million parameters" if total >= 100_000 else f"{total:,} parameters"
