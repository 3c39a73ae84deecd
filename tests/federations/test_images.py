"""A federation on images: two sites, a ViT with a new head, results that PEFT loads."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

from server.report.write import write_report
from tests.harness.in_one_process import in_one_process
from tests.harness.results import records
from tests.harness.tiny_images import COLORS, make_image_federation


def test_sites_learn_to_tell_images_apart(tmp_path: Path) -> None:
    run = in_one_process(make_image_federation(tmp_path, {"site-a": 8, "site-b": 12}))
    own = [r["evaluate"] for r in records(run, "evaluate") if r["client"] == "server"]
    assert own[-1]["loss"] < own[0]["loss"]
    counts = [[own[-1][f"confusion/{i}/{j}"] for j in range(3)] for i in range(3)]
    assert [sum(line) for line in counts] == [4.0] * 3
    assert own[-1]["accuracy"] == sum(counts[i][i] for i in range(3)) / 12
    sites = [r["evaluate"] for r in records(run, "evaluate") if r["client"] != "server"]
    assert sites
    assert not [name for scores in sites for name in scores if "confusion" in name]
    write_report(run)
    assert "Confusion matrix" in (run / "report.html").read_text()
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", num_labels=3, id2label=dict(enumerate(COLORS)), ignore_mismatched_sizes=True
    )
    adapted = PeftModel.from_pretrained(base, run / "model")
    size = AutoImageProcessor.from_pretrained(run / "model", backend="pil").size
    assert adapted(pixel_values=torch.zeros(1, 3, size["height"], size["width"])).logits.shape == (1, 3)
