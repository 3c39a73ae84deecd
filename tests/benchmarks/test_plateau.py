"""The long runs' models and data: small ones here, made of files of the same form."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.plateau import prepare
from common.config.load import load
from common.config.site import SiteConfig
from common.config.task import ImageClassificationTask, SequenceClassificationTask
from common.data.tasks import make_task
from common.errors import LaunchError

CODES = [f"{letter}{number:02}" for letter in "AC" for number in range(90)]


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CLIENTS", (3,))
    monkeypatch.setattr(prepare, "ALPHAS", (100.0,))


def test_text_keeps_categories_apart_and_the_decoder_knows_those_of_no_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.experiments.plateau import base_models

    seen: list[list[str]] = []
    real = base_models.decoder
    monkeypatch.setattr(base_models, "decoder", lambda texts, *rest: (seen.append(texts), real(texts, *rest)))
    chapters = {"A": 1, "C": 2}
    found = {
        letter: "".join(
            f"<diag><name>{code}</name><desc>illness {code}</desc>"
            f"<inclusionTerm><note>term {code}</note></inclusionTerm>"
            f"<diag><name>{code}.1</name><desc>illness {code} again</desc></diag></diag>"
            for code in CODES
            if code[0] == letter
        )
        for letter in chapters
    }
    xml = tmp_path / "tabular.xml"
    text = "".join(f"<chapter><name>{n}</name>{found[letter]}</chapter>" for letter, n in chapters.items())
    xml.write_text(f"<list>{text}</list>")
    prepare.text(xml, tmp_path / "made", steps=2)
    parts = [
        {title.split()[1] for title in seen[0]},
        *(
            {row["title"].split()[1] for row in rows(tmp_path / "made" / "titles" / f"{s}.jsonl")}
            for s in ("test", "validation")
        ),
        {row["title"].split()[1] for file in (tmp_path / "made/titles/3-100.0").glob("*.jsonl") for row in rows(file)},
    ]
    assert set.union(*parts) == set(CODES)
    assert sum(map(len, parts)) == len(CODES)
    site = load(tmp_path / "made" / "coding" / "3-100.0" / "site-01.yaml", SiteConfig)
    assert (site.data.prompt, site.data.answer) == ("term", "title")
    task = make_task(SequenceClassificationTask(labels=["infections", "neoplasms"]))
    assert task.load(str(tmp_path / "made" / "decoder"), None, "float32", 0).head == "new"


def test_images_are_of_the_half_that_the_vision_model_has_not_seen(tmp_path: Path) -> None:
    pixels = torch.arange(80 * 28 * 28).reshape(80, 28, 28).remainder(251).byte()
    for name, head, content in (("images-idx3", 16, pixels.numpy().tobytes()), ("labels-idx1", 8, bytes([1, 2] * 40))):
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + content))
    made = tmp_path / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_IMAGES", {"train": 30, "validation": 4, "test": 6})
        prepare.images(tmp_path, made, steps=2)
    assert sorted(int(file.stem) for file in (made / "images" / "png").iterdir()) == [*range(40, 80)]
    site = made / "images" / "3-100.0" / "site-02.yaml"
    task = make_task(ImageClassificationTask(labels=prepare.KINDS))
    found = task.rows(load(site, SiteConfig).data, site).rows
    assert {row.answer for row in found} <= {"trouser", "pullover"}
    base = task.load(str(made / "vision"), None, "float32", 0)
    batch = task.collater(base.tokenizer)(task.examples(base.tokenizer, found[:3], None, 8))
    assert base.model(pixel_values=batch["pixel_values"]).logits.shape == (3, 10)


def test_missing_images_are_told_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="FASHION_MNIST"):
        prepare.fashion(tmp_path)
