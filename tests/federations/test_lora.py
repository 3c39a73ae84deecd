"""LoRA federations: mixed ranks, a trained head, and results that PEFT loads."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import outcome, payload, records

PARTS = ("hand", "foot", "ear")
IDS = torch.arange(5, 13)[None]


@pytest.fixture(scope="module")
def flexlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site-a with the federation's rank 4, site-b capped at 2."""
    strategy = {"name": "flexlora", "modules": "linear", "rank": 4, "lora_alpha": 8.0, "merge": True}
    folder = tmp_path_factory.mktemp("flexlora")
    file = make_federation(folder, {"site-a": 9, "site-b": 17}, strategy=strategy)
    site = folder / "site-b.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "max_rank": 2}))
    return in_one_process(file)


def test_sites_of_different_rank_exchange_factors_of_their_own_rank(flexlora: Path) -> None:
    whole = outcome(flexlora)["trained"]
    half = {name: [2 if side == 4 else side for side in shape] for name, shape in whole.items()}
    for record in records(flexlora, "train"):
        expected = payload(whole if record["client"] == "site-a" else half)
        assert record["bytes"] == {"down": expected, "up": expected}


def test_every_round_reports_truncation_ranks_and_drift_per_block(flexlora: Path) -> None:
    rounds = records(flexlora, "aggregate")
    assert [r["round"] for r in rounds] == [1, 2]
    for record in rounds:
        found = record["diagnostics"]
        names = {"truncation-loss", "numerical-rank", "stable-rank", "client-norm", "client-cosine"}
        assert {name.partition("/")[0] for name in found} == names
        for block in range(4):
            group = f"base_model.model.model.layers.{block}"
            assert 0 <= found[f"truncation-loss/{group}"] < 1
            assert 1 <= found[f"numerical-rank/{group}"] <= 6  # ranks 4 and 2 together
            assert found[f"client-norm/{group}"] > 0


def test_adapter_folder_loads_with_peft_and_equals_the_merged_model(flexlora: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(flexlora.parents[1] / "model")
    plain = base(input_ids=IDS).logits.detach()
    adapted = PeftModel.from_pretrained(base, flexlora / "model")
    merged = AutoModelForCausalLM.from_pretrained(flexlora / "merged")
    torch.testing.assert_close(adapted(input_ids=IDS).logits, merged(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted(input_ids=IDS).logits, plain, atol=1e-4)


def test_trained_head_of_a_classifier_is_averaged_and_counted(tmp_path: Path) -> None:
    file = make_federation(
        tmp_path,
        {"site-a": 12, "site-b": 24},
        rounds=1,
        strategy={"name": "fedit", "rank": 2, "head": "train"},
        task={"type": "sequence-classification", "labels": list(PARTS)},
    )
    for shard in tmp_path.glob("*.jsonl"):
        rows = [json.loads(line) for line in shard.read_text().splitlines()]
        labelled = [{**row, "title": next(part for part in PARTS if part in row["term"])} for row in rows]
        shard.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    run = in_one_process(file)
    shapes = outcome(run)["trained"]
    (head,) = [name for name in shapes if "lora" not in name]
    assert all(r["bytes"]["up"] == payload(shapes) for r in records(run, "train"))
    scores = {"loss", "perplexity", "examples", "accuracy", "macro_f1", "mcc"}
    for record in records(run, "evaluate"):  # counts by label are of the server's own set only
        counts = {f"confusion/{i}/{j}" for i in range(3) for j in range(3)} if record["client"] == "server" else set()
        assert set(record["evaluate"]) == scores | counts
    assert [name for name in records(run, "aggregate")[0]["diagnostics"] if name.startswith("aggregation-error/")]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=len(PARTS))
    adapted = PeftModel.from_pretrained(base, run / "model")
    kept = {n.replace(".modules_to_save.default.", "."): p for n, p in adapted.named_parameters()}
    assert tuple(kept[head].shape) == (len(PARTS), 32)
    assert adapted(input_ids=IDS).logits.shape == (1, len(PARTS))
