"""The site's base model: complete, of a kind that can be trained, the federation's; and what of it is trained."""

from collections.abc import Iterable

from client.preflight.context import CheckContext
from client.preflight.finding import Finding
from common.errors import ModelError
from common.model.base_model import check_length
from common.model.families import blocks_of, kind_of, linear_layers


def files(subject: CheckContext) -> Finding:
    """The folder's weights are all there and whole, and the model's own."""
    source, revision = subject.source
    base = subject.base
    found = f"{source}, {_count(p.numel() for p in base.model.parameters())}"
    if revision is not None:
        found += f" at {revision}, from the hub's cache or the hub"
    return Finding("ok", found + (f"; classifier's head: {base.head}" if subject.task.labels else ""))


def family(subject: CheckContext) -> Finding:
    """The model has blocks with linear layers, of which some can be trained."""
    model = subject.base.model
    found = blocks_of(model)
    layers = ", ".join(name for name, _ in linear_layers(found[0][1]))
    return Finding("ok", f"{kind_of(model)}, {len(found)} blocks of {layers}")


def digests(subject: CheckContext) -> Finding:
    """Digests of base model and tokenizer: those in the federation file, and those that the server compares."""
    named = subject.federation.model if subject.federation is not None else None
    if named is not None and (wrong := named.difference(*subject.digests)) is not None:
        raise ModelError(wrong)
    model, tokenizer = (digest[:16] for digest in subject.digests)
    dtype = str(next(subject.base.model.parameters()).dtype).removeprefix("torch.")
    told = "those of the federation file" if named and named.digest else "the server compares them with its own"
    return Finding("ok", f"model {model} ({dtype}), tokenizer {tokenizer}; {told}")


def selection(subject: CheckContext) -> Finding:
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
