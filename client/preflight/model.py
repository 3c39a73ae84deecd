"""The site's base model: complete, of a kind that can be trained, the federation's; and what of it is trained."""

import shutil
import tempfile
from collections.abc import Iterable

from client.preflight.context import CheckContext
from client.preflight.finding import Finding, Skip
from client.site_model import written_bytes
from client.training.settings import lora_rank
from common.data.packing import choose
from common.errors import ModelError
from common.model.base_model import check_length
from common.model.families import blocks_of, kind_of, linear_layers
from common.model.quantization import whole_sizes
from common.text import size


def files(subject: CheckContext) -> Finding:
    """The folder's weights are all there and whole, and the model's own."""
    source, revision = subject.source
    base = subject.base
    found = f"{source}, {_count(number for number, _ in whole_sizes(base.model))}"
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
    if settings.training.packing == "on":
        choose(tuned.model, "on", None, packs=subject.task.packs)
    text = f"{len(tuned.parameters)} tensors, {_count(p.numel() for p in tuned.parameters.values())}"
    text += f" of {_count(number for number, _ in whole_sizes(tuned.model))}"
    if tuned.local:
        text += f"; {len(tuned.local)} more stay here"
    return Finding("ok", f"{settings.strategy.name} trains {text}")


def kept(subject: CheckContext) -> Finding:
    """The folder for the federation's model is free or ours, and its disk has room."""
    keep, settings = subject.site.keep, subject.settings
    folder = subject.site.model_folder(subject.site_file, settings.name)
    if keep is None or folder is None:
        raise Skip("the site file has no `keep`: the federation's model does not come here")
    subject.site.check_model_folder(subject.site_file, settings.name)
    rank = lora_rank(subject.site, settings.strategy)
    one = written_bytes(subject.tuned, settings.strategy, rank) * (1 + bool(subject.tuned.local))
    # A new model is written before an old one is removed; what may be the best round's is held until it is judged.
    need = one * {"end": 2, "best": 4, "every": settings.rounds + 1}[keep.when]
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding("FAIL", f"{there} cannot be written ({error.strerror})", "name another folder in `keep.model`")
    found = f"{size(one)} go to {folder} ({keep.when}); with all that is kept on the way {size(need)}"
    if free < need:
        mend = "make room, name a folder on another disk in `keep.model`, or keep fewer (`keep.when: end`)"
        return Finding("FAIL", f"{found}, {size(free)} are free", mend)
    return Finding("ok", found)


def _count(numbers: Iterable[int]) -> str:
    total = sum(numbers)
    return f"{total / 1e6:.1f} million parameters" if total >= 100_000 else f"{total:,} parameters"
