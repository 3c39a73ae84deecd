"""Models and data of the long runs: ``python -m benchmarks.experiments.plateau.prepare [--cache DIR]``.

Needs Debian's package dataset-fashion-mnist (MIT), installed or unpacked: the environment variable FASHION_MNIST names
the folder of its ``*-ubyte.gz`` files. Writes into the cache (default ``.cache/plateau``):

    decoder/            a Llama of 0.3 M weights, trained to write ICD-10-CM titles of one half of the categories
    titles/, coding/    rows of the other half: title to chapter, and inclusion term to title; no category in two splits
    vision/             a ViT of 0.2 M weights, trained to tell by how much images of one half are turned
    images/             images of the other half, with their classes

Each of the three holds ``validation.jsonl``, ``test.jsonl`` and ``N-ALPHA/site-*.*``: the other rows, dealt out to N
sites by Dirichlet(ALPHA) over the labels.
"""

import gzip
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from benchmarks.experiments.prepare import Row, deal, write
from common.errors import DataError, LaunchError
from common.system.command import program
from deploy.demo.icd import read_entries
from deploy.demo.prepare import build, install, only, preparing

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
DEFAULT_CACHE = HERE.parents[2] / ".cache" / "plateau"
FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CLIENTS, ALPHAS = (3, 50), (100.0, 0.3)  # labels nearly equal everywhere, and unequal
CHAPTERS = {
    1: "infections", 2: "neoplasms", 4: "metabolic", 7: "eye", 9: "circulatory",
    11: "digestive", 13: "musculoskeletal", 14: "genitourinary", 15: "pregnancy", 17: "congenital",
}  # fmt: skip
KINDS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
_MOST_TITLES = 700  # per chapter: some have ten times as many titles as others
_IMAGES = {"train": 10_000, "validation": 1_000, "test": 2_000}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prepare(cache: Path) -> bool:
    """Make ``cache`` complete; see ``deploy.demo.prepare.build``."""
    return build(cache, (REQUIREMENTS, *sorted(HERE.glob("*.py"))), _make)


def _make(packages: Path, result: Path) -> None:
    install(packages, REQUIREMENTS)
    text(only(packages, "simple_icd_10_cm/data/*tabular*.xml"), result)
    images(FASHION, result)


def text(xml: Path, result: Path, steps: int = 2000) -> None:
    """The decoder, and the rows of both tasks on ICD-10-CM."""
    from benchmarks.experiments.plateau.base_models import decoder

    known: list[str] = []
    titles: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for chapter in ElementTree.parse(xml).getroot().iter("chapter"):  # noqa: S314 - from a wheel with a known hash
        label, count = CHAPTERS.get(int(chapter.findtext("name", "0"))), Counter[str]()
        found = {d.findtext("desc", "").strip(): d.findtext("name", "")[:3] for d in chapter.iter("diag")}
        for title in sorted(found, key=_draw):
            split = _split(found[title])
            if split is None:
                known.append(title)
            elif label is not None and count.total() < _MOST_TITLES:
                count[split] += 1
                titles[split].append({"title": title, "chapter": label})
    decoder(sorted(known), TEMPLATE, result / "decoder", steps)
    _deal(result / "titles", titles, "title", "chapter", "chapter")
    coding: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for entry in read_entries(xml):
        if (split := _split(entry.category)) is not None:
            coding[split].append({"term": entry.term, "title": entry.code_title, "chapter": entry.chapter})
    _deal(result / "coding", coding, "term", "title", "chapter")


def images(source: Path, result: Path, steps: int = 2000) -> None:
    """The ViT, and images as PNG files.

    Raises:
        LaunchError: the data set is not there.
    """
    from PIL import Image

    from benchmarks.experiments.plateau.base_models import vision

    pixels, labels = fashion(source)
    half = len(pixels) // 2
    vision(pixels[:half], result / "vision", steps)
    (result / "images" / "png").mkdir(parents=True)
    rows: list[Row] = []
    for number in range(half, min(len(pixels), half + sum(_IMAGES.values()))):
        name = f"png/{number}.png"
        Image.fromarray(pixels[number].numpy()).save(result / "images" / name)
        rows.append({"image": name, "kind": KINDS[labels[number]]})
    splits, first = {}, 0
    for split, most in _IMAGES.items():
        splits[split] = rows[first : first + most]
        first += most
    splits["train"] = [{**row, "image": f"../{row['image']}"} for row in splits["train"]]  # tables lie one deeper
    _deal(result / "images", splits, "image", "kind", "kind")


def fashion(source: Path) -> "tuple[Tensor, list[int]]":
    """The training images (60,000, 28, 28), 8 bits each, and their classes.

    Raises:
        LaunchError: the files are not in ``source``.
        DataError: they are no such files.
    """
    import torch

    files = [source / f"train-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    try:
        raw = [gzip.decompress(file.read_bytes()) for file in files]
    except OSError:
        raise LaunchError(
            f"{source} holds no Fashion-MNIST; install Debian's package dataset-fashion-mnist, or unpack it "
            "(apt-get download, dpkg -x) and name its folder of *-ubyte.gz files in FASHION_MNIST"
        ) from None
    labels, pixels = [*raw[1][8:]], torch.frombuffer(bytearray(raw[0][16:]), dtype=torch.uint8)
    if len(pixels) != len(labels) * 28 * 28:
        raise DataError(f"{source} holds {len(labels)} labels and images of {len(pixels)} pixels in all")
    return pixels.reshape(-1, 28, 28), labels


def _split(category: str) -> str | None:
    """The split of a three-character category of ICD-10-CM; None: the base model has seen its titles."""
    number = int(_draw(category), 16) % 16
    return None if number < 8 else "test" if number < 10 else "validation" if number == 10 else "train"


def _deal(folder: Path, splits: dict[str, list[Row]], prompt: str, answer: str, label: str) -> None:
    for split in ("validation", "test"):
        write(folder / f"{split}.jsonl", splits[split])
    for clients in CLIENTS:
        for alpha in ALPHAS:
            deal(folder / f"{clients}-{alpha}", splits["train"], label, clients, alpha, prompt=prompt, answer=answer)


def _draw(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    name, what = "python -m benchmarks.experiments.plateau.prepare", "the long runs' models and data"
    command = preparing(what, DEFAULT_CACHE, prepare, "fedspan experiment benchmarks/experiments/plateau/titles.yaml")
    sys.exit(program(name, f"prepare {what}", command))
