"""A federation on images, through the launcher: two sites, a ViT with a new head, results that PEFT loads."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.harness.launcher import launch, survivors
from tests.harness.tiny_images import COLORS, make_image_federation


@pytest.mark.long
def test_sites_learn_to_tell_images_apart(tmp_path: Path) -> None:
    file = make_image_federation(tmp_path, {"site-a": 8, "site-b": 12})
    done = launch(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert survivors(file) == []
    run = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [r["evaluate"] for r in records if r["phase"] == "evaluate" and r["client"] == "server"]
    assert own[-1]["loss"] < own[0]["loss"]
    counts = [[own[-1][f"confusion/{i}/{j}"] for j in range(3)] for i in range(3)]
    assert [sum(line) for line in counts] == [4.0] * 3
    assert own[-1]["accuracy"] == sum(counts[i][i] for i in range(3)) / 12
    sites = [r["evaluate"] for r in records if r["phase"] == "evaluate" and r["client"] != "server"]
    assert sites
    assert not [name for scores in sites for name in scores if "confusion" in name]
    assert "Confusion matrix" in (run / "report.html").read_text()
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", num_labels=3, id2label=dict(enumerate(COLORS)), ignore_mismatched_sizes=True
    )
    adapted = PeftModel.from_pretrained(base, run / "model")
    size = AutoImageProcessor.from_pretrained(run / "model", backend="pil").size
    assert adapted(pixel_values=torch.zeros(1, 3, size["height"], size["width"])).logits.shape == (1, 3)
