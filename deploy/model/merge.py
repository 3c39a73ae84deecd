"""Merge an adapter into its base model: ``fedspan model merge FOLDER --out DIR`` writes a complete model."""

import argparse
import shutil
from pathlib import Path

from common.errors import ConfigError, ModelError
from common.model.finished import read_finished, write_model
from common.system.command import Command
from common.text import size
from deploy.model.card import check_unchanged
from deploy.model.loading import add_folder, load

_SPARE = 2**25  # bytes beside the weights: the tokenizer, and what the disk needs


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")


def _run(options: argparse.Namespace) -> None:
    merge(options.folder, options.out, options.base)
    print(f"{options.out} holds the complete model")  # noqa: T201


def merge(folder: Path, out: Path, base: Path | None) -> None:
    """Write the complete model that an adapter and its base make; whole, or not at all.

    Args:
        folder: the adapter's folder.
        out: the folder to write.
        base: the base model's folder; None: the one that the adapter's configuration names.

    Raises:
        ConfigError: ``out`` exists, or its disk has no room.
        ModelError: ``folder`` holds no adapter, its files have changed, or the base model is missing or another one.
    """
    from peft import get_peft_model_state_dict

    from common.model.tuning import Tuned

    if out.exists():
        raise ConfigError(f"{out} exists; name a new folder with --out")
    finished = read_finished(folder)
    if finished.card.form != "adapter":
        raise ModelError(f"{folder} holds a complete model; there is nothing to merge")
    check_unchanged(folder, finished)
    loaded = load(folder, base, device="cpu")
    needed = sum(p.numel() * p.element_size() for p in loaded.model.get_base_model().parameters()) + _SPARE
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise ConfigError(f"the disk of {out} has {size(free)} free; the merged model needs {size(needed)}")
    card = finished.card.model_copy(update={"form": "model"})
    factors = get_peft_model_state_dict(loaded.model)
    write_model(out, Tuned(loaded.model, {}, {}), factors, loaded.tokenizer, finished.use, card, loaded.base)


MERGE = Command(
    _arguments,
    _run,
    example="runs/coding/model --base models/smollm2 --out coding-model",
    then="fedspan model ask coding-model QUESTION",
    notes="Runs here alone; nothing is fetched or sent.",
)
