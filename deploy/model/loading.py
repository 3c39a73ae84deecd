"""Load a finished model from its folder, as the federation evaluated it."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.config.federation import EvaluationConfig
from common.config.site import MARK
from common.errors import ModelError
from common.model.finished import Finished, read_finished, source_folder

if TYPE_CHECKING:
    import torch

    from common.data.evaluation import EvalSettings
    from common.data.tasks import Task

ADAPTER, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A finished model in memory.

    Attributes:
        finished: content of its fedspan.json.
        task: its learning task.
        model: a transformers model, or a PEFT model; in evaluation mode, on ``device``.
        tokenizer: its tokenizer, or image processor.
        device: CUDA where there is a GPU.
        base: folder of the base model under an adapter; None: a complete model.
    """

    finished: Finished
    task: "Task[Any]"
    model: Any
    tokenizer: Any
    device: "torch.device"
    base: Path | None

    def settings(self, evaluation: EvaluationConfig, system: str | None) -> "EvalSettings":
        """Settings of an evaluation, with the folder's own where ``evaluation`` has none."""
        from common.data.evaluation import EvalSettings

        return EvalSettings(evaluation, self.finished.use.max_length, self.device, system)


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads a model."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the model's folder, which holds fedspan.json")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="folder of the base model under an adapter (default: as the adapter or its run says, or the hub's cache)",
    )


def offline() -> None:
    """Keep Hugging Face's libraries from the network; call before the first of them is imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def load(folder: Path, base: Path | None, *, device: str | None = None) -> Loaded:
    """Load a finished model.

    Args:
        folder: the model's folder.
        base: the base model's folder, for an adapter; None: the one that the adapter's configuration names.
        device: PyTorch's name; None: CUDA where there is a GPU.

    Raises:
        ModelError: the folder holds no finished model, or not all of it; or the base model is missing, or another one.
    """
    finished = read_finished(folder)
    _all_there(folder, finished)
    offline()
    import torch
    from transformers.utils import logging

    from common.data.tasks import make_task

    logging.set_verbosity_error()  # a base model's head is new, which is no news
    card, task = finished.card, make_task(finished.card.task)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if card.form == "adapter":
        source = _base_of(folder, finished, base)
        model, tokenizer = _with_adapter(folder, finished, task, source)
    else:
        if base is not None:
            raise ModelError(f"{folder} holds a complete model, which needs no --base")
        source = None
        loaded = task.load(str(folder), None, card.base.dtype, finished.use.seed)
        model, tokenizer = loaded.model, loaded.tokenizer
    model.to(place).train(False)
    return Loaded(finished, task, model, tokenizer, place, source)


def _all_there(folder: Path, finished: Finished) -> None:
    """Refuse a model that lacks files, or what every site has kept for itself."""
    if missing := [name for name in finished.files if not (folder / name).is_file()]:
        raise ModelError(f"{folder} lacks {', '.join(missing[:3])}; copy the whole folder")
    card = finished.card
    if (own := card.kept_at_sites) and not card.personal:
        raise ModelError(f"{folder} lacks the {own} that every site keeps for itself; take a site's own model")


def _base_of(folder: Path, finished: Finished, given: Path | None) -> Path:
    """The folder of the base model under an adapter: given, named by the adapter or its run, or in the hub's cache."""
    if given is not None:
        return given
    base = finished.card.base
    named = [
        _named(folder / ADAPTER, "base_model_name_or_path"),
        _named(folder.parent / "federation.yaml", "model", "path"),
        _named(folder.parent / MARK, "base"),
    ]
    found = [Path(name) for name in named if name and Path(name).is_absolute()]
    if base.revision is not None:
        found += filter(None, [source_folder(base.name, base.revision)])
    there = next((path for path in found if path.is_dir()), None)
    if there is None:
        raise ModelError(
            f"{folder} is an adapter for {base.name}, which is not found here; give its folder with --base"
        )
    return there


def _named(file: Path, *keys: str) -> str | None:
    """A text in a file of JSON or YAML, by the keys that lead to it."""
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return value if isinstance(value, str) else None


def _with_adapter(folder: Path, finished: Finished, task: "Task[Any]", source: Path) -> Any:  # noqa: ANN401
    """The base model with the adapter, and the base's tokenizer.

    The adapter is made as for training, so that it computes as at the sites, and then gets the tensors in the folder.
    """
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from common.model import tuning
    from common.model.adapters import LORA_A
    from common.model.quantization import Held
    from common.protocol.digest import base_digest, tokenizer_digest

    card = finished.card
    base = task.load(str(source), None, card.base.dtype, finished.use.seed, Held(as_stored=True))
    found = {"base model": base_digest(base.model), "tokenizer": tokenizer_digest(base.tokenizer)}
    for what, wanted in {"base model": card.base.digest, "tokenizer": card.base.tokenizer_digest}.items():
        if found[what] != wanted:
            raise ModelError(
                f"{folder} is an adapter for {card.base.name}; {source} is another model: digest of its {what} "
                f"{found[what]}, wanted {wanted}"
            )
    try:
        saved = load_file(folder / TENSORS)
    except (OSError, SafetensorError):
        raise ModelError(f"{folder / TENSORS} is damaged or cut off") from None
    ranks = {tensor.shape[0] for name, tensor in saved.items() if name.endswith(LORA_A)}
    tuned = tuning.tune(
        base.model, card.strategy, task.peft_type, rank=max(ranks, default=None), seed=finished.use.seed
    )
    wanted_names = set(peft.get_peft_model_state_dict(tuned.model))
    if wanted_names != saved.keys():
        odd = min(wanted_names ^ saved.keys())
        raise ModelError(f"{folder / TENSORS} does not fit {card.base.name}: {odd} is in one of them only")
    try:
        peft.set_peft_model_state_dict(tuned.model, saved)
    except RuntimeError:
        raise ModelError(f"{folder / TENSORS} does not fit {card.base.name}: tensors have other shapes") from None
    return tuned.model, base.tokenizer
