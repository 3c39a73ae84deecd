"""Every site that keeps the model has the server's own, byte for byte; a personal one is usable alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.config.site import SiteConfig
from common.data.rows import load_rows, split_held_out
from deploy import cli
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import events, lines, outcome, same_bits
from tests.harness.tiny_images import make_image_federation

SIZES = {"site-a": 9, "site-b": 17}
IDS = torch.arange(5, 13)[None]
LORA = {"modules": "linear", "rank": 4, "lora_alpha": 8.0}


def keeping(file: Path, when: str = "end", **of_sites: dict[str, Any]) -> Path:
    """Let all sites of a federation keep the model, in a folder beside their site files."""
    for path in map(Path, yaml.safe_load(file.read_text())["local"]["sites"]):
        site = file.parent / path
        told = yaml.safe_load(site.read_text())
        told |= {"keep": {"model": f"models-{told['name']}", "when": when}} | of_sites.get(told["name"], {})
        site.write_text(yaml.safe_dump(told))
    return file


def digests(folder: Path) -> dict[str, str]:
    """Of all files in a model's folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedftg", "rank": 4},
        {"name": "fedftg", "rank": 4, "subspace": "shared"},
        pytest.param({"name": "fedit", **LORA}, marks=pytest.mark.long),
        pytest.param({"name": "fedex-lora", **LORA}, marks=pytest.mark.long),
        {"name": "flora", **LORA},
        {"name": "flexlora", **LORA},
    ],
    ids=lambda strategy: strategy["name"] + strategy.get("subspace", ""),
)
def test_sites_hold_the_servers_model_byte_for_byte(tmp_path: Path, strategy: dict[str, Any]) -> None:
    file = make_federation(tmp_path, SIZES, strategy=strategy)
    mixed = {"max_rank": 2} if strategy["name"] in ("flora", "flexlora") else {}
    run = in_one_process(keeping(file, **{"site-b": mixed}))
    assert [(e["client"], e["round"], e["same"]) for e in events(run, "model_delivered")] == [
        ("site-a", 2, True),
        ("site-b", 2, True),
    ]
    wanted = digests(run / "model")
    assert {"README.md", "fedspan.json", "tokenizer.json"} < wanted.keys()
    for site in SIZES:
        assert digests(tmp_path / f"models-{site}" / "tiny" / "model") == wanted
    assert outcome(run)["undelivered"] == []
    lacked = {site: came_again(tmp_path, site) for site in SIZES}
    assert lacked["site-a"] == 0  # it was asked by digest alone
    assert (lacked["site-b"] > 0) == (strategy["name"] == "flexlora")  # the half of the rank that it never had


def came_again(folder: Path, site: str) -> int:
    """Bytes of tensors that a site was sent for the delivery."""
    entries = [e for e in lines(folder / f"{site}-ledger.jsonl") if e.get("message") == "deliver"]
    assert [e["out"]["tensors"] for e in entries if e["event"] == "sent"] == [{}]
    return sum(e["in"]["bytes"] for e in entries if "in" in e)


@pytest.mark.parametrize(
    "strategy", [{"name": "fedftg", "rank": 1}, {"name": "fedit", **LORA}], ids=["fedftg", "fedit"]
)
@pytest.mark.parametrize("cold", [False, True])
def test_best_rounds_model_is_written_from_what_the_sites_have_kept(
    tmp_path: Path, strategy: dict[str, Any], cold: bool
) -> None:
    best = {"min_change": 100.0}  # no later round is better by as much
    file = keeping(make_federation(tmp_path, SIZES, strategy=strategy, rounds=3, best=best), "best")
    run = in_one_process(file, cold=cold)
    told = outcome(run)
    assert (told["best"]["round"], told["last_round"]) == (1, 3)
    wanted = digests(run / "best")
    assert wanted["fedspan.json"] != digests(run / "model")["fedspan.json"]
    assert "the best by loss" in (run / "best" / "README.md").read_text()
    for site in SIZES:
        assert digests(tmp_path / f"models-{site}" / "tiny" / "best") == wanted
        assert not (tmp_path / f"models-{site}" / "tiny" / ".held").exists()
        assert came_again(tmp_path, site) == 0


def test_every_rounds_model_can_be_kept(tmp_path: Path) -> None:
    run = in_one_process(keeping(make_federation(tmp_path, SIZES, rounds=2), "every"))
    short = tmp_path / "short"
    short.mkdir()
    before = in_one_process(make_federation(short, SIZES, rounds=1))
    for site in SIZES:
        folder = tmp_path / f"models-{site}" / "tiny"
        assert sorted(path.name for path in folder.iterdir()) == ["delivered.json", "round-001", "round-002"]
        assert digests(folder / "round-002") == digests(run / "model")
        first = digests(folder / "round-001")["model.safetensors"]
        assert first == digests(before / "model")["model.safetensors"]


def test_personal_model_has_the_sites_own_factors_and_answers_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"name": "fedsa-lora", **LORA}
    file = make_federation(tmp_path, SIZES, strategy=strategy, evaluation={"server": None})
    run = in_one_process(keeping(file))
    found = {}
    for site in SIZES:
        folder = tmp_path / f"models-{site}" / "tiny"
        assert digests(folder / "model") == digests(run / "model")
        found[site] = load_file(folder / "personal" / "adapter_model.safetensors")
        shared = load_file(folder / "model" / "adapter_model.safetensors")
        assert found[site].keys() == shared.keys()
        for name, tensor in found[site].items():
            assert torch.equal(tensor, shared[name]) == (".lora_A." in name), name
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        plain = base(input_ids=IDS).logits.detach().clone()
        adapted = PeftModel.from_pretrained(base, folder / "personal")
        assert not torch.allclose(adapted(input_ids=IDS).logits, plain)
        assert "one site's own LoRA factor B" in (folder / "personal" / "README.md").read_text()
        (own,) = (tmp_path / f"{site}-own" / "tiny").glob("*-round-000002.safetensors")
        assert own.stat().st_mode & 0o777 == 0o600
        told = next(
            r for r in lines(run / "metrics.jsonl") if (r["client"], r["phase"], r["round"]) == (site, "evaluate", 2)
        )
        command = ["model", "score", str(folder / "personal"), "--data", str(held_out(tmp_path, site)), "--json"]
        assert cli.main([*command, "--generate=0", "--rows=4"]) == 0
        scores = json.loads(capsys.readouterr().out)["scores"]
        assert scores["loss"] == pytest.approx(
            told["evaluate"]["loss"], abs=2e-6
        )  # with the site's own columns and base
    assert any(not torch.equal(found["site-a"][name], found["site-b"][name]) for name in found["site-a"])


def held_out(folder: Path, site: str) -> Path:
    """A file of the rows that a site keeps for evaluation."""
    data = SiteConfig.model_validate(yaml.safe_load((folder / f"{site}.yaml").read_text())).data
    terms = {row.prompt for row in split_held_out(load_rows(data, folder / "x").rows, data.held_out)[1]}
    file = folder / f"{site}-held-out.jsonl"
    rows = (folder / f"{site}.jsonl").read_text().splitlines()
    file.write_text("\n".join(row for row in rows if json.loads(row)["term"] in terms))
    return file


def test_image_site_with_a_head_of_its_own_has_both_models(tmp_path: Path) -> None:
    strategy = {"name": "rolora", "modules": "linear", "rank": 2, "head": "local"}
    file = make_image_federation(tmp_path, {"site-a": 4, "site-b": 5}, strategy=strategy, evaluation={})
    run = in_one_process(keeping(file))
    for site in ("site-a", "site-b"):
        folder = tmp_path / f"models-{site}" / "tiny"
        assert digests(folder / "model") == digests(run / "model")
        shared, own = (load_file(folder / name / "adapter_model.safetensors") for name in ("model", "personal"))
        assert {name for name in own if not torch.equal(own[name], shared[name])} == {
            name for name in own if "classifier" in name
        }


def test_site_says_why_it_has_written_no_model(tmp_path: Path) -> None:
    """Its folder is a file; and one of another's answers leaves the run as good as it is."""
    file = keeping(make_federation(tmp_path, SIZES))
    (tmp_path / "models-site-b").write_text("no folder")
    run = in_one_process(file)
    assert [e["client"] for e in events(run, "model_delivered")] == ["site-a"]
    (missing,) = events(run, "model_missing")
    assert missing["reason"] == "site-b: the model cannot be written (Not a directory)"
    assert outcome(run)["undelivered"] == ["site-b"]
    (tmp_path / "models-site-b").unlink()
    in_one_process(file, resume=True)  # the delivery alone
    assert digests(tmp_path / "models-site-b" / "tiny" / "model") == digests(run / "model")
    assert [e["client"] for e in events(run, "model_delivered")] == ["site-a", "site-b"]
    assert len(events(run, "round_started")) == 2
    assert outcome(run)["undelivered"] == []


def test_sites_own_tensors_outlive_a_killed_run(tmp_path: Path) -> None:
    """All processes die in round 2, and with them Flower's contexts; the result is that of a run in one go."""
    strategy, evaluation = {"name": "fedsa-lora", "optimizer_state": "keep", **LORA}, {"server": None}
    straight = tmp_path / "straight"
    straight.mkdir()
    wanted = in_one_process(
        keeping(make_federation(straight, SIZES, strategy=strategy, evaluation=evaluation, rounds=3))
    )
    file = keeping(make_federation(tmp_path, SIZES, strategy=strategy, evaluation=evaluation, rounds=3))
    in_one_process(file, killed_in=3)
    run = in_one_process(file, resume=True)
    same_bits(run, wanted)
    for site in SIZES:
        folders = [folder / f"models-{site}" / "tiny" for folder in (tmp_path, straight)]
        for name in ("model", "personal"):
            one, other = (digests(folder / name)["adapter_model.safetensors"] for folder in folders)
            assert one == other
