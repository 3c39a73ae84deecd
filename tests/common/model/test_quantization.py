"""A quantised base: what is held in codes, what it computes, and which files and settings are refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, ResNetConfig

from common.config.strategy import FedFTGConfig, FedITConfig, FLoRAConfig, LoraConfig, StrategyConfig
from common.config.task import CausalLMTask
from common.data.tasks import make_task
from common.errors import ModelError
from common.model.base_model import Base
from common.model.quantization import Held, QuantizedLinear, quantize, quantized_layers, untrained, whole_sizes
from common.model.tuning import tune
from common.protocol.digest import base_digest
from deploy.sandbox.tiny import make_model, make_tokenizer

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


def load(
    folder: Path, quantization: Any = "whole", strategy: StrategyConfig | None = None, dtype: Any = "float32"
) -> Base:
    return make_task(CausalLMTask()).load(str(folder), None, dtype, 0, Held(quantization, strategy))


def gpt2(folder: Path) -> Path:
    """A family whose layers keep their weights as (in, out), with biases."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", [(48, 32), (33, 6), (4200, 1024)])
def test_codes_of_pieces_are_those_of_bitsandbytes_for_the_whole_weight(shape: tuple[int, int]) -> None:
    import bitsandbytes

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    mine = quantize(weight, "nf4")
    assert torch.equal(mine["weight"], codes)
    assert torch.equal(mine["absmax"], state.absmax)
    assert torch.equal(mine["nested"], state.state2.absmax)
    layer = QuantizedLinear(nn.Linear(shape[1], shape[0]), weight.shape, mine, torch.float32, "")
    assert torch.equal(layer.whole(torch.float32), bitsandbytes.functional.dequantize_4bit(codes, state))


def test_rows_in_8_bit_are_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    layer = QuantizedLinear(nn.Linear(30, 50), weight.shape, quantize(weight, "int8"), torch.float32, "")
    off = (layer.whole(torch.float32) - weight).abs()
    assert (off <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    assert not off[3].any()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_weight_that_the_codes_stand_for(
    quantization: Any, dtype: torch.dtype
) -> None:
    old = nn.Linear(32, 48)
    layer = QuantizedLinear(old, old.weight.shape, quantize(old.weight.detach(), quantization), torch.float32, "")
    whole = layer.whole(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    mine = layer(x)
    mine.square().sum().backward()
    given = x.detach().clone().requires_grad_(True)
    theirs = nn.functional.linear(given, whole, old.bias.detach().to(dtype))
    theirs.square().sum().backward()
    assert mine.dtype == dtype
    assert torch.equal(mine, theirs)
    assert given.grad is not None
    assert torch.allclose(x.grad, given.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(layer(x), mine, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16
    assert not list(layer.weight.grad_fn.next_functions) if layer.weight.grad_fn else True


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_base_has_the_digest_of_its_files(
    folder: Path, tmp_path: Path, quantization: Any, family: str, dtype: str
) -> None:
    where = folder if family == "llama" else gpt2(tmp_path / "gpt2")
    whole, mine = load(where, dtype=dtype).model, load(where, quantization, dtype=dtype).model
    assert base_digest(mine) == base_digest(whole)
    assert sorted(whole_sizes(mine)) == sorted(whole_sizes(whole))
    assert vars(mine.config).keys() - {"_is_quantized"} == vars(whole.config).keys()
    held, all_of_it = (sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (mine, whole))
    assert held < all_of_it
    with torch.no_grad():
        theirs, ours = whole(IDS).logits.float(), mine(IDS).logits.float()
    assert (ours - theirs).norm() < {"nf4": 0.25, "int8": 0.02}[quantization] * theirs.norm()


def test_embeddings_norms_heads_and_trained_weights_stay_whole(folder: Path) -> None:
    trained = FedFTGConfig(blocks="lower half", modules="mlp")
    whole = dict(load(folder).model.named_parameters())
    model = load(folder, "nf4", trained).model
    kept = dict(model.named_parameters())
    lower = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")}
    norms = {name for name in whole if "norm" in name}
    assert kept.keys() == {"model.embed_tokens.weight", *norms, *lower}
    assert all(torch.equal(kept[name], whole[name]) for name in kept)
    assert {name for name, _ in quantized_layers(model)} == {
        name.removesuffix(".weight") for name in whole.keys() - kept.keys()
    }
    added = load(folder, "nf4", FLoRAConfig(modules="attention")).model
    assert {name.split(".")[3] for name, _ in quantized_layers(added)} == {"mlp"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_factors_are_the_same_beside_codes_and_whole_weights(folder: Path, tmp_path: Path, family: str) -> None:
    where, strategy = folder if family == "llama" else gpt2(tmp_path / "gpt2"), FedITConfig(rank=4)
    whole, mine = (
        tune(load(where, q, strategy, "bfloat16").model, strategy, "CAUSAL_LM").get() for q in ("whole", "nf4")
    )
    assert whole.keys() == mine.keys()
    assert all(torch.equal(whole[name], mine[name]) for name in whole)


@pytest.mark.parametrize("method", ["nf4", "int8", "fp4", "gptq"])
def test_stored_codes_are_used_as_they_are_or_refused_with_the_mend(folder: Path, tmp_path: Path, method: str) -> None:
    stored, lora = tmp_path / "stored", FedITConfig(rank=4)
    if method == "gptq":
        make_model(stored)
        config = json.loads((stored / "config.json").read_text())
        (stored / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    else:
        how = {"load_in_8bit": True} if method == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": method}
        how |= {"bnb_4bit_use_double_quant": True} if method == "nf4" else {}
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**how)).save_pretrained(
            stored
        )
        make_tokenizer().save_pretrained(stored)
    if method in ("fp4", "gptq"):
        with pytest.raises(
            ModelError, match=rf"stored is stored quantised \({method}, by `quantization_config` of its"
        ):
            load(stored, "nf4", lora)
        return
    model = load(stored, method, lora).model
    again = load(folder, method, lora).model
    ours, theirs = dict(quantized_layers(model)), dict(quantized_layers(again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(layer.weight, theirs[name].weight) for name, layer in ours.items() if method == "nf4")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, again(IDS).logits, atol=1e-2)
    assert base_digest(model) == base_digest(load(stored, method, lora).model) != base_digest(again)
    logits = tune(model, lora, "CAUSAL_LM").model(IDS).logits
    logits.square().mean().backward()
    other = "int8" if method == "nf4" else "nf4"
    with pytest.raises(ModelError, match=rf"is to be held {other}; write `model.quantization: {method}`"):
        load(stored, other, lora)
    asked = make_task(CausalLMTask()).load(str(stored), None, "float32", 0, Held(as_stored=True))  # as for an adapter
    assert base_digest(asked.model) == base_digest(load(stored, method, lora).model)
    with pytest.raises(ModelError, match=r"`strategy` fedftg changes base weights, which needs whole weights"):
        load(stored, method, FedFTGConfig())
    with pytest.raises(ModelError, match=r"with `merge` writes a complete model, which needs whole weights"):
        load(stored, method, FedITConfig(merge=True))


def test_nothing_to_quantise_is_said(folder: Path) -> None:
    everything: Any = LoraConfig
    everything = FLoRAConfig(modules="linear", blocks="all")
    with pytest.raises(
        ModelError, match=r"of which there are none: `strategy` flora changes them all; allowed .* whole"
    ):
        load(folder, "nf4", everything)
    from transformers import ResNetForImageClassification

    convolutions = ResNetForImageClassification(ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8))
    with pytest.raises(ModelError, match=r"resnet model .* of which there are none: it has no others"):
        untrained(convolutions, Held("int8"))


def test_model_in_codes_is_not_tuned_for_a_strategy_that_changes_them(folder: Path) -> None:
    model = load(folder, "int8", FedITConfig()).model
    with pytest.raises(ModelError, match=r"mlp.gate_proj.weight is held in int8, and `strategy` fedftg changes it"):
        tune(model, FedFTGConfig(), None)


def test_4_bit_without_bitsandbytes_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ModelError, match=r"`model.quantization` nf4 needs bitsandbytes at the server and at every site"
    ):
        load(folder, "nf4")
    assert any(quantized_layers(load(folder, "int8").model))
