"""Every family's layers by hand, on tiny random models as transformers builds them."""

import pytest
import torch
import transformers as hf
from torch import nn

from common.errors import ModelError, SelectionError
from common.model.families import freeze_all_but, select

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {**SIZES, "image_size": 28, "patch_size": 14}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
LLAMA_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
QKVO = [f"self_attn.{x}_proj" for x in "qkvo"]
FC = ["mlp.fc1", "mlp.fc2"]
BERT_ATTENTION = [*(f"attention.self.{x}" for x in ("query", "key", "value")), "attention.output.dense"]
VISION_ATTENTION = [f"attention.{x}_proj" for x in "qkvo"]


def siglip() -> nn.Module:
    config = hf.SiglipConfig(vision_config=VISION, text_config={**TEXT, "num_hidden_layers": 2})
    return hf.SiglipForImageClassification(config)


FAMILIES = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), "model.layers", LLAMA_MLP, QKVO),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)), "model.layers", LLAMA_MLP, QKVO),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)), "model.layers", LLAMA_MLP, QKVO),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)), "model.layers", LLAMA_MLP, QKVO),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED)), "model.layers", LLAMA_MLP, QKVO),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED)), "model.layers", LLAMA_MLP, QKVO),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED)), "model.layers", LLAMA_MLP, QKVO),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
        ),
        "transformer.h",
        ["mlp.c_fc", "mlp.c_proj"],
        ["attn.c_attn", "attn.c_proj"],
    ),
    "gpt_neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)),
        "gpt_neox.layers",
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ["attention.query_key_value", "attention.dense"],
    ),
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        "bert.encoder.layer",
        ["intermediate.dense", "output.dense"],
        BERT_ATTENTION,
    ),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        "roberta.encoder.layer",
        ["intermediate.dense", "output.dense"],
        BERT_ATTENTION,
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), "vit.layers", FC, VISION_ATTENTION),
    "siglip": (siglip, "vision_model.encoder.layers", FC, [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]),
    "siglip_vision": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
        "encoder.layers",
        FC,
        [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")],
    ),
    "dinov2": (
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2)
        ),
        "dinov2.encoder.layer",
        FC,
        VISION_ATTENTION,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_selects_its_mlp_and_attention(family: str) -> None:
    build, path, mlp, attention = FAMILIES[family]
    model = build()
    for modules, names in (("mlp", mlp), ("attention", attention), ("linear", [*attention, *mlp])):
        layers = select(model, modules, "lower half")
        assert {layer.name for layer in layers} == {f"{path}.{i}.{name}" for i in (0, 1) for name in names}
        assert all(layer.transposed == (family == "gpt2") for layer in layers)
        assert {layer.block for layer in layers} == {0, 1}
        for layer in layers:
            assert model.get_parameter(layer.weight).ndim == 2


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return FAMILIES["llama"][0]()


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        ("all", {0, 1, 2, 3}),
        ("lower third", {0, 1}),
        ("lower half", {0, 1}),
        ("lower quarter", {0}),
        ("lower 3", {0, 1, 2}),
        ("0-2", {0, 1, 2}),
        ("0,3", {0, 3}),
        ("0-1, 3", {0, 1, 3}),
        ("Lower Third", {0, 1}),
    ],
)
def test_blocks(llama: nn.Module, blocks: str, numbers: set[int]) -> None:
    assert {layer.block for layer in select(llama, "mlp", blocks)} == numbers


@pytest.mark.parametrize(
    "modules", [["up_proj"], ["mlp.up_proj"], ["up_proj.weight"], "up_proj", ["model.layers.0.mlp.up_proj"]]
)
def test_modules_by_name(llama: nn.Module, modules: str | list[str]) -> None:
    assert [layer.weight for layer in select(llama, modules, "lower 1")] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("modules", "blocks", "says"),
    [
        (
            ["up_prj"],
            "all",
            "'up_prj' in `blocks` 'all' matches no tensor of this llama model (did you mean 'mlp.up_proj'?)",
        ),
        (["embed_tokens"], "all", "each of its 4 blocks has: self_attn.q_proj"),
        ("mlp", "0-9", "`blocks` '0-9': this model has 4 blocks, 0 to 3"),
        ("mlp", "lower 9", "this model has 4 blocks"),
        ("mlp", "upper half", "`blocks` 'upper half' is not readable; allowed: `all`, `lower third`"),
        ("mlp", "3-1", "is not readable"),
        ("mlp", "", "is not readable"),
        (["up_proj", "nothing"], "all", "'nothing'"),
    ],
)
def test_selection_that_matches_nothing_says_what_it_could_match(
    llama: nn.Module, modules: str | list[str], blocks: str, says: str
) -> None:
    with pytest.raises(SelectionError) as caught:
        select(llama, modules, blocks)
    assert says in str(caught.value)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="this Linear model has no list of blocks with linear layers"):
        select(nn.Linear(2, 2), "mlp", "all")


def test_freeze_all_but_leaves_exactly_the_selected_weights_trainable(llama: nn.Module) -> None:
    trained = freeze_all_but(llama, select(llama, ["down_proj"], "0,2"))
    assert list(trained) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)]
    assert {name for name, p in llama.named_parameters() if p.requires_grad} == trained.keys()


def test_tied_weight_is_not_selected_silently() -> None:
    model = FAMILIES["llama"][0]()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SelectionError, match=r"is tied to model.layers.1.mlp.up_proj.weight"):
        freeze_all_but(model, select(model, ["up_proj"], "lower 1"))


def test_transposed_layer_really_is_in_by_out() -> None:
    model = FAMILIES["gpt2"][0]()
    layer = next(x for x in select(model, ["c_fc"], "lower 1"))
    assert model.get_parameter(layer.weight).shape == torch.Size([32, 128])
