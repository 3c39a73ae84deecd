"""The folder of a finished model: what transformers or PEFT load, and what one must know to use it.

    model.safetensors, ...   the model or the adapter, with its tokenizer
    LICENSE, ...             the base model's, from its own folder
    fedspan.json             how to ask it and score it, its card's facts, digests of the other files
    README.md                the card

The server and every site write it with ``write_model``.
"""

import hashlib
import json
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field

from common.config.federation import FederationConfig
from common.config.load import parse
from common.config.section import DataConfig, Digest, Section
from common.config.task import ClassificationTask
from common.errors import ConfigError, ModelError
from common.model.card import BaseFacts, Card, Licence, render
from common.system.files import built

if TYPE_CHECKING:
    from torch import Tensor

    from common.model.tuning import Tuned

FACTS, README = "fedspan.json", "README.md"
_LICENCES = ("LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*")  # files that go along with a model
_TITLES = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit"}  # how their texts begin, and a hub's names
_MOST = 2**20  # bytes of a fedspan.json, or of a base model's README.md, that are read


class Use(Section):
    """How the model was evaluated, and so how it is asked."""

    seed: int = Field(description="Seed of what the base model's files lack, such as a new head.")
    max_length: int = Field(ge=1, description="Most tokens of a row.")
    max_new_tokens: int = Field(ge=1, description="Most tokens of an answer.")
    batch_size: int = Field(ge=1, description="Rows in one pass.")
    prompt: str = Field("", description="Column or template of the prompt; empty: not known here.")
    answer: str = Field("", description="Column or template of the answer, or the label's column.")
    messages: str | None = Field(None, description="Column with a conversation, in place of both.")
    system: str | None = Field(None, description="System message.")

    @classmethod
    def of(cls, federation: FederationConfig, data: DataConfig | None) -> "Use":
        """As a federation evaluates; ``data``: the set of the server, or of the site, that evaluates."""
        evaluation = federation.evaluation
        columns = {} if data is None else data.model_dump(include={"prompt", "answer", "messages", "system"})
        return cls(
            seed=federation.training.seed,
            max_length=federation.training.max_length,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            **columns,
        )


class About(Section):
    """The facts that the server tells the sites about a model that they write."""

    use: Use
    card: Card


class Finished(About):
    """The content of fedspan.json."""

    format: Literal[1] = 1
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$", max_length=256)], Digest] = Field(
        description="SHA-256 of the other files, but for README.md."
    )


def write_model(
    folder: Path,
    tuned: "Tuned",
    tensors: "Mapping[str, Tensor]",
    tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no useful type
    use: Use,
    card: Card,
    base: Path | None,
) -> None:
    """Write a finished model's folder, complete or not at all; an old folder is replaced.

    Args:
        folder: where.
        tuned: the model, whose parameters may have other values afterwards.
        tensors: values of the trained parameters, those that stay at a site included.
        tokenizer: the tokenizer, or the image processor.
        use: how the model is asked.
        card: the facts about the model.
        base: the base model's folder, for its licence; None: none here.

    Raises:
        OSError: it cannot be written.
    """
    from common.model.export import save  # here, so that a look at a card does not load PyTorch

    with built(folder) as new:
        labelled, merged = isinstance(card.task, ClassificationTask), card.form == "model"
        how = card.strategy, tokenizer
        save(new, tuned, tensors, *how, base=card.base, labelled=labelled, merged=merged)
        for file in _licence_files(base):
            shutil.copyfile(file, new / file.name)
        finished = Finished(use=use, card=card, files=digests(new))
        (new / FACTS).write_text(finished.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (new / README).write_text(render(card), encoding="utf-8")
        mode = stat.S_IMODE((new / README).stat().st_mode)  # as the umask says; safetensors writes 0600
        for file in new.rglob("*"):
            if file.is_file():
                file.chmod(mode)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's files by their path in the folder, but for fedspan.json, README.md and hidden files."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in (FACTS, README) and not re.search(r"(^|/)\.", name):
            found[name] = _digest(file)
    return found


def files_digest(folder: Path) -> str:
    """Digest of the names and contents of all files of a model's folder (hex)."""
    every = digests(folder) | {name: _digest(folder / name) for name in (FACTS, README) if (folder / name).is_file()}
    return hashlib.sha256("".join(f"{name} {every[name]}\n" for name in sorted(every)).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_finished(folder: Path) -> Finished:
    """Read the fedspan.json of a finished model's folder.

    Raises:
        ModelError: it is missing, no JSON, too long, or holds a key or value that is not allowed.
    """
    file = folder / FACTS
    if not file.is_file():
        what = f"holds no {FACTS}, so that nothing tells how to use it" if folder.is_dir() else "does not exist"
        raise ModelError(f"model folder {folder} {what}; take a folder that a federation has written")
    try:
        if file.stat().st_size > _MOST:
            raise ModelError(f"{file} is larger than {_MOST} bytes, so it is no {FACTS}")
        return parse(json.loads(file.read_text(encoding="utf-8")), Finished, str(file))
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is no valid JSON") from None
    except ConfigError as error:
        raise ModelError(str(error)) from None


def base_facts(federation: FederationConfig, folder: Path | None, digest: str, tokenizer_digest: str) -> BaseFacts:
    """The facts about a federation's base model.

    Args:
        federation: the federation file.
        folder: the base model's folder on this machine; None: there is none.
        digest: digest of the loaded weights, hex.
        tokenizer_digest: digest of the tokenizer, hex.
    """
    model = federation.model
    name = model.hub or (folder.resolve().name if folder is not None else "")
    shown = "".join(c for c in name if c.isprintable())[:256] or "base model"
    return BaseFacts(
        name=shown,
        revision=model.revision,
        digest=digest,
        tokenizer_digest=tokenizer_digest,
        dtype=model.dtype,
        held=[model.quantization, *(form for form in model.site_quantization if form != model.quantization)],
        licence=licence_of(folder),
    )


def source_folder(source: str, revision: str | None) -> Path | None:
    """The folder on this machine that a base model is loaded from; None: a hub model that is not in the cache."""
    if revision is None:
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def licence_of(folder: Path | None) -> Licence:
    """The licence of a base model, by the front matter of its own card; else by the file with its text."""
    front = _front_matter(folder / README) if folder is not None else {}
    told = front.get("license")
    try:
        if isinstance(told, str):
            return Licence(id=told.lower(), name=front.get("license_name"), link=front.get("license_link"))
    except ValueError:  # no licence's name, or texts that no card should repeat
        pass
    file = next(_licence_files(folder), None)
    if file is None:
        return Licence()
    begin = " ".join(file.read_bytes()[:256].decode(errors="replace").split())
    known = next((name for title, name in _TITLES.items() if begin.startswith(title)), None)
    return Licence(id="other", name=file.name.lower(), link=file.name) if known is None else Licence(id=known)


def _front_matter(file: Path) -> dict[str, Any]:
    """The YAML at the start of a card; empty when there is none that can be read."""
    try:
        with file.open(encoding="utf-8") as opened:
            opening, _, rest = opened.read(_MOST).partition("\n")
        front = yaml.safe_load(rest.partition("\n---")[0]) if opening.strip() == "---" else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def _licence_files(folder: Path | None) -> Iterator[Path]:
    for pattern in _LICENCES if folder is not None else ():
        yield from (file for file in sorted(folder.glob(pattern)) if file.is_file())  # type: ignore[union-attr]
