"""Federations over a quantised base: every strategy, sites that hold it otherwise, and the files that they write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client import app as site_app, received
from client.session import Session
from client.site_model import Bases
from common.config.federation import FederationConfig, resolved, settings_for_sites
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ModelError
from common.model.finished import About, files_digest, read_finished
from common.model.quantization import QuantizedLinear, quantized_layers
from deploy.sandbox.tiny import make_federation, make_model
from server.loop.server_model import ServerModel
from server.run.outcome import Outcome
from tests.client.test_methods_apps import LORA, LastingSite, of, run
from tests.client.test_recorded_curves import RECORDED, STRATEGIES

MIXED = {"path": "model", "quantization": "nf4", "site_quantization": ["whole"]}


def with_whole_b(folder: Path, sizes: dict[str, int], **changes: Any) -> Path:
    """A federation whose second site holds whole weights."""
    file = make_federation(folder, sizes, **changes)
    site = folder / "site-b.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "quantization": "whole"}))
    return file


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_site_in_4_bit_and_a_whole_one_learn_together_as_whole_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setenv(received.LONG_LIVED, "1")
    monkeypatch.setenv(site_app.SESSIONS, "2")
    monkeypatch.setattr(site_app, "_sessions", {})
    monkeypatch.setattr(site_app, "_bases", {})
    changes: dict[str, Any] = {"evaluation": {"server": None}} if strategy == "fedsa-lora" else {}
    _, records, _ = run(
        tmp_path,
        make=with_whole_b,
        site_kind=LastingSite,
        model=MIXED,
        strategy=STRATEGIES[strategy],
        rounds=3,
        **changes,
    )
    losses = of(records, "evaluate")
    whole = json.loads(RECORDED.read_text())[strategy]["loss"]
    means = [sum(losses[site, n]["evaluate"]["loss"] for site in ("site-a", "site-b")) / 2 for n in range(4)]
    assert means == pytest.approx(whole, rel=0.02)
    assert means[0] != whole[0]
    assert means[-1] < means[0]
    held = {key[1]: sum(1 for _ in quantized_layers(s.model.base.model)) for key, s in site_app._sessions.items()}
    assert sorted(map(bool, held.values())) == [False, True]


def sessions(folder: Path, **changes: Any) -> tuple[FederationConfig, Path, list[Session]]:
    """Two sites of one process, in 4 bit and whole, and a third in 4 bit."""
    file = with_whole_b(folder, {"site-a": 12, "site-b": 12, "site-c": 12}, model=MIXED, **changes)
    config, bases = resolved(load(file, FederationConfig), file), Bases()
    sites = [folder / f"{name}.yaml" for name in ("site-a", "site-b", "site-c")]
    return config, file, [Session(load(site, SiteConfig), site, config, bases) for site in sites]


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedftg", "rank": 4},
        {"name": "flora", **LORA},
        {"name": "flexlora", **LORA},
        {"name": "fedit", **LORA, "merge": True},
    ],
    ids=["fedftg", "flora", "flexlora", "merged"],
)
def test_finished_model_has_the_files_own_weights_wherever_it_is_written(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    config, file, sites = sessions(tmp_path, strategy=strategy)
    server = ServerModel(config, file)
    state = {name: tensor + 1e-3 for name, tensor in server.initial_state().items()}
    card = server.card(state, Outcome(1, sites=2))
    server.export(state, tmp_path / "server", card)
    about = About(use=server.use, card=card)
    wanted = files_digest(tmp_path / "server")
    for number, session in enumerate(sites[:2]):
        session.hello()
        session.model.write(tmp_path / str(number), state, about, {})
        assert files_digest(tmp_path / str(number)) == wanted
    told = read_finished(tmp_path / "server").card
    assert told.base.held == ["nf4", "whole"]
    assert "untrained weights while training: `nf4, whole`" in (tmp_path / "server" / "README.md").read_text()
    written = tmp_path / ("merged" if strategy.get("merge") else "server")
    if not (written / "model.safetensors").exists():
        return  # an adapter
    base, made = (load_file(place / "model.safetensors") for place in (tmp_path / "model", written))
    changed = {name for name, tensor in base.items() if not torch.equal(made[name], tensor)}
    trained = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in state}
    trained |= {name.replace(".lora_A", "") for name in trained}
    assert made.keys() == base.keys()
    assert changed
    assert changed == trained & base.keys()


def test_base_files_that_change_while_training_are_noticed_before_a_model_is_written(tmp_path: Path) -> None:
    config, file, (site, *_) = sessions(tmp_path)
    server = ServerModel(config, file)
    state = server.initial_state()
    card = server.card(state, Outcome(1, sites=2))
    site.hello()
    make_model(tmp_path / "model", seed=1)
    with pytest.raises(ModelError, match=r"the base model's files have changed since training began: digest"):
        site.model.write(tmp_path / "x", state, About(use=server.use, card=card), {})
    with pytest.raises(ModelError, match=r"the base model's files have changed since training began: digest"):
        server.export(state, tmp_path / "y", card)


def test_sites_of_a_process_share_codes_and_the_hello_says_how_the_base_is_held(tmp_path: Path) -> None:
    _, _, (first, whole, third) = sessions(tmp_path)
    assert [s.hello().device for s in (first, third)] == ["cpu, base model in nf4"] * 2
    assert whole.hello().device == "cpu"
    assert len({s.hello().base_digest for s in (first, whole, third)}) == 1
    codes = [
        {name: layer.weight.data_ptr() for name, layer in quantized_layers(s._tuned.model)} for s in (first, third)
    ]
    assert codes[0] == codes[1] != {}
    assert not any(quantized_layers(whole._tuned.model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_frozen_layers_in_codes_pass_gradients_on_under_checkpointing_and_autocast(tmp_path: Path) -> None:
    """Every trained weight gets one, through layers in codes above it; the same with and without checkpoints."""
    found: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        _, _, (site, *_) = sessions(folder, training={"gradient_checkpointing": checkpointing})
        site.hello()
        before = site._tuned.get()
        site.train(1, list(before))
        found.append(site._tuned.get())
        assert all(not torch.equal(found[-1][name], tensor) for name, tensor in before.items())
    assert all(torch.allclose(tensor, found[1][name], atol=1e-6) for name, tensor in found[0].items())
    model: Any = site._tuned.model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in site._tuned.parameters.values())
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_site_chooses_only_what_the_federation_file_allows(tmp_path: Path) -> None:
    file = with_whole_b(tmp_path, {"site-b": 12}, model={"path": "model", "quantization": "int8"})
    config, site = resolved(load(file, FederationConfig), file), tmp_path / "site-b.yaml"
    says = r"the site file asks for `quantization` whole; .* `model.site_quantization` allow: int8"
    with pytest.raises(ModelError, match=says):
        Session(load(site, SiteConfig), site, config).hello()


def test_settings_of_federations_of_whole_weights_are_as_before_the_keys(tmp_path: Path) -> None:
    whole = load(make_federation(tmp_path, {"site-a": 9}), FederationConfig)
    told = json.loads(settings_for_sites(resolved(whole, tmp_path / "federation.yaml")))
    assert not {"quantization", "site_quantization"} & told["model"].keys()
    mixed = load(make_federation(tmp_path, {"site-a": 9}, model=MIXED), FederationConfig)
    told = json.loads(settings_for_sites(mixed))
    assert (told["model"]["quantization"], told["model"]["site_quantization"]) == ("nf4", ["whole"])
