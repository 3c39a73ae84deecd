"""Rows and site files of the experiment with differential privacy: is a title of ICD-10-CM a tumour's or the heart's?

Titles of chapters 2 (neoplasms) and 9 (diseases of the circulatory system), as many of either; no category is in two
splits. The sites' rows are dealt out evenly, so that sites differ by chance alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

CHAPTERS = {2: "neoplasm", 9: "circulatory"}
CLIENTS = (10, 20, 50, 200)
PRIVACY = {"clip": 0.5, "noise_multiplier": 2.7, "delta": 1e-5, "max_epsilon": 8.0}  # five rounds cost 7.94

Row = dict[str, str]


def make(xml: Path, folder: Path) -> None:
    """Write the test and validation rows; for N sites rows and site files in ``N/``, without noise in ``N-open/``."""
    splits = titles(xml)
    for split in ("validation", "test"):
        _write(folder / f"{split}.jsonl", splits[split])
    train = splits["train"]
    for clients in CLIENTS:
        for number in range(clients):
            name = f"site-{number + 1:03}"
            pairs = range(2 * number, len(train) - 1, 2 * clients)  # a title of either label each
            _write(folder / str(clients) / f"{name}.jsonl", [row for at in pairs for row in train[at : at + 2]])
            data = {"path": f"../{clients}/{name}.jsonl", "prompt": "title", "answer": "label", "held_out": 0.0}
            site = {"name": name, "data": data}
            _dump(folder / f"{clients}-open" / f"{name}.yaml", site)
            _dump(folder / str(clients) / f"{name}.yaml", {**site, "privacy": PRIVACY})


def titles(xml: Path) -> dict[str, list[Row]]:
    """Rows by split, the labels in turns; the same in every run."""
    found: dict[str, dict[str, Row]] = {label: {} for label in CHAPTERS.values()}
    categories: dict[str, str] = {}
    for chapter in ElementTree.parse(xml).getroot().iter("chapter"):  # noqa: S314 - from a wheel with a known hash
        label = CHAPTERS.get(int(chapter.findtext("name", "0")))
        for diagnosis in chapter.iter("diag") if label is not None else ():
            title = diagnosis.findtext("desc", "").strip()
            found[str(label)].setdefault(title.lower(), {"title": title, "label": str(label)})
            categories.setdefault(title.lower(), diagnosis.findtext("name", "")[:3])
    splits: dict[str, list[Row]] = {}
    for split, draws in {"test": (0, 1), "validation": (2,), "train": (3, 4, 5, 6, 7)}.items():
        of_labels = [
            [rows[key] for key in sorted(rows, key=_draw) if _draw(categories[key]) % 8 in draws]
            for rows in found.values()
        ]
        splits[split] = [row for pair in zip(*of_labels, strict=False) for row in pair]
    return splits


def _dump(file: Path, site: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(site), encoding="utf-8")


def _write(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _draw(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
