"""A site that trains on images, with every family, head and strategy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from client.preflight.traffic import bytes_per_round
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.protocol.factors import num_bytes
from common.protocol.tensors import Tensors
from tests.harness.processes import ROOT, environment
from tests.harness.tiny_images import make_image_federation


def session(tmp_path: Path, family: str = "vit", **strategy: Any) -> Session:
    server = {"evaluation": {}} if strategy.get("head") == "local" else {}
    file = make_image_federation(tmp_path, {"site-a": 8}, family, strategy=strategy, **server)
    site = tmp_path / "site-a.yaml"
    return Session(load(site, SiteConfig), site, resolved(load(file, FederationConfig), file))


def head(own: Session) -> Tensors:
    """By name without PEFT's copy that is not in use."""
    named = own._tuned.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if "classifier" in n and "original_module" not in n}


@pytest.mark.parametrize("family", ["vit", "siglip", "dinov2"])
def test_every_family_learns_colors(tmp_path: Path, family: str) -> None:
    own = session(tmp_path, family, name="fedit", modules="linear", rank=2, head="train")
    tensors = own._tuned.get()
    assert sum("classifier" in name for name in tensors) == 2  # weight and bias
    own.set_state(tensors, None, list(tensors))
    before = own.evaluate()
    assert {"accuracy", "macro_f1", "mcc"} <= before.keys()
    assert not [name for name in before if "confusion" in name]  # how many images of a site have which label
    for number in range(1, 4):
        trained, metrics = own.train(number, list(tensors))
        own.set_state(trained, None, list(tensors), after=number)
    assert metrics["tokens"] == 60.0  # 10 steps of 6 images
    assert "rows_left_out" not in metrics
    assert own.evaluate()["loss"] < 0.7 * before["loss"]


@pytest.mark.parametrize("choice", ["train", "freeze", "local"])
def test_head_is_averaged_frozen_or_kept(tmp_path: Path, choice: str) -> None:
    own = session(tmp_path, name="rolora", rank=2, head=choice)
    tensors = own._tuned.get()
    active = [name for name in tensors if "lora_A" not in name]
    own.set_state(tensors, None, active)
    fresh = head(own)
    trained, _ = own.train(1, active)
    moved = any(not torch.equal(tensor, fresh[name]) for name, tensor in head(own).items())
    assert moved == (choice != "freeze")
    assert any("classifier" in name for name in trained) == (choice == "train")
    assert bool(own.kept) == (choice == "local")


@pytest.mark.parametrize("choice", ["train", "freeze", "local"])
def test_fedftg_trains_the_blocks_and_the_head_beside_them(tmp_path: Path, choice: str) -> None:
    own = session(tmp_path, name="fedftg", blocks="all", rank=2, scale=1.0, head=choice)
    weights = own.weights
    assert weights is not None
    exchanged = {n.partition("layers.")[2].partition(".")[2] or n for n in weights.tensors}
    heads = {"classifier.weight", "classifier.bias"}
    assert exchanged == {"mlp.fc1.weight", "mlp.fc2.weight"} | (heads if choice == "train" else set())
    own.follow([], weights.first, weights.first)
    fresh, before = head(own), own.evaluate()
    sent, _ = own.train(1, list(weights.tensors))
    moved = [name for name, tensor in head(own).items() if not torch.equal(tensor, fresh[name])]
    assert set(moved) == (set() if choice == "freeze" else heads)
    assert own.evaluate()["loss"] < before["loss"]
    assert own.kept.keys() == (heads if choice == "local" else set())
    assert {name for name in sent if "/" not in name} == (heads if choice == "train" else set())
    assert bytes_per_round(own.federation, dict(own._tuned.parameters), 10)[1] == num_bytes(sent.values())
    for name in heads & sent.keys():
        torch.testing.assert_close(sent[name], head(own)[name], rtol=1e-6, atol=1e-7)


def test_unreadable_images_are_counted_where_the_site_allows_it(tmp_path: Path) -> None:
    own = session(tmp_path, name="fedit", rank=2, head="train")
    (tmp_path / "site-a" / "red" / "broken.png").write_bytes(b"no image")
    site = own.site.model_copy(update={"data": own.site.data.model_copy(update={"skip_unreadable": True})})
    own = Session(site, tmp_path / "site-a.yaml", own.federation)
    tensors = own._tuned.get()
    own.set_state(tensors, None, list(tensors))
    assert own.train(1, list(tensors))[1]["rows_left_out"] == 1


def test_other_settings_of_the_image_processor_are_noticed(tmp_path: Path) -> None:
    one = session(tmp_path / "one", name="fedit", rank=2, head="train")
    two = session(tmp_path / "two", name="fedit", rank=2, head="train")
    assert one.hello().tokenizer_digest == two.hello().tokenizer_digest
    file = tmp_path / "two" / "model" / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    three = Session(two.site, tmp_path / "two" / "site-a.yaml", two.federation)
    assert three.hello().tokenizer_digest != two.hello().tokenizer_digest
    assert three.hello().base_digest == two.hello().base_digest


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_head_is_the_same_on_every_processor(tmp_path: Path, dtype: str) -> None:
    """So server and sites, which compare the digest of the base model with it, may have different ones."""
    code = (
        "import sys; from pathlib import Path; from client.session import Session; "
        "from common.config.federation import FederationConfig, resolved; from common.config.load import load; "
        "from common.config.site import SiteConfig; file, site = map(Path, sys.argv[1:]); "
        "config = resolved(load(file, FederationConfig), file); "
        "print(Session(load(site, SiteConfig), site, config).hello().base_digest)"
    )
    strategy = {"name": "fedit", "rank": 2, "head": "train"}
    file = make_image_federation(tmp_path, {"site-a": 8}, strategy=strategy, model={"path": "model", "dtype": dtype})
    digests = set()
    for capability in ("default", "avx2", "avx512"):  # one that is not there falls back
        command = [sys.executable, "-c", code, str(file), str(tmp_path / "site-a.yaml")]
        env = {**environment(), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=True)
        digests.add(done.stdout.strip())
    assert len(digests) == 1
