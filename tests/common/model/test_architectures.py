"""Tiny instances of the hub's usual models: what is selected, a round of FedFTG and of FedIT, exports that load again.

``python -m tests.common.model.test_architectures`` writes the table of docs/architectures.md anew.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

from client.training.settings import make_optimizer
from common.config.strategy import FedFTGConfig, FedITConfig
from common.config.task import CausalLMTask, ImageClassificationTask, SequenceClassificationTask
from common.config.training import TrainingConfig
from common.data.chat import Example, collate, padded
from common.data.tasks import Task, make_task
from common.errors import ModelError
from common.model.base_model import check_length
from common.model.families import blocks_of, group_of, kind_of, linear_layers, select
from common.model.tuning import first_state, tune
from deploy.sandbox.tiny import make_tokenizer
from strategies.flower.named import make_rule
from strategies.rule import Update

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
LABELS = ["no", "yes"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.3}
TEXT["max_position_embeddings"] = 64
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
VISION = {**SIZES, "image_size": 28, "patch_size": 14, "initializer_range": 0.3}
BARE = {key: value for key, value in VISION.items() if key != "intermediate_size"}
EXPERTS = {**HEADS, "num_experts_per_tok": 1}


def without(sizes: dict[str, Any], *keys: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if key not in keys} | more


def _made(name: str, config: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, name)(getattr(hf, config)(**sizes))


DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
DISTIL = {"vocab_size": 320, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "pad_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 320, "n_positions": 64, "bos_token_id": 0}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}
NAFLEX = {**without(VISION, "image_size"), "num_patches": 4}
MANY = {"vision_config": {**VISION, "num_hidden_layers": 8}, "text_config": {**HEADS, "layer_types": None}}

#: By what people call them: transformers' class, the class of its configuration, and a tiny one.
CAUSAL = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", HEADS),
    "Mistral": ("MistralForCausalLM", "MistralConfig", HEADS),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "Gemma 1": ("GemmaForCausalLM", "GemmaConfig", HEADS),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    "Gemma 3, text": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "Gemma 3, multimodal": ("Gemma3ForConditionalGeneration", "Gemma3Config", {**MANY, "mm_tokens_per_image": 4}),
    "Phi-3 and 4": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "SmolLM 3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "Falcon": ("FalconForCausalLM", "FalconConfig", without(TEXT, "intermediate_size", ffn_hidden_size=48)),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": 2, "initializer_range": 0.3}),
    "GPT-NeoX, Pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "OPT": ("OPTForCausalLM", "OPTConfig", without(TEXT, "intermediate_size", ffn_dim=48, word_embed_proj_dim=32)),
}
TEXTS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    "XLM-R": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", TEXT),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertConfig", {**DISTIL, "initializer_range": 0.3}),
    "DeBERTa v3": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {**TEXT, **DEBERTA}),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}),
    "ModernBERT": ("ModernBertForSequenceClassification", "ModernBertConfig", without(TEXT, "initializer_range")),
}
IMAGES = {
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", VISION),
    "Swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "mlp_ratio": 2, "initializer_range": 0.3}),
    "SigLIP": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": VISION, "text_config": TEXT}),
    "SigLIP 2": ("Siglip2ForImageClassification", "Siglip2Config", {"vision_config": NAFLEX, "text_config": TEXT}),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", {**BARE, "mlp_ratio": 2}),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "image_size": 32, "initializer_range": 0.3},
    ),
}
REFUSED = {
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 2}),
    "Qwen 3, mixture of experts": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**EXPERTS, "num_experts": 2, "moe_intermediate_size": 16},
    ),
}
ALL = {**CAUSAL, **TEXTS, **IMAGES}
QUICK = ("Phi-3 and 4", "GPT-2", "DeBERTa v3", "Swin")


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _made(*{**ALL, **REFUSED}[name])().eval()


def task_of(name: str) -> Task[Any]:
    if name in CAUSAL or name in REFUSED:
        return make_task(CausalLMTask())
    return make_task(
        SequenceClassificationTask(labels=LABELS) if name in TEXTS else ImageClassificationTask(labels=LABELS)
    )


def saved(name: str, folder: Path) -> Path:
    """The model as the hub would have it, a classifier without a finished head."""
    model: Any = build(name)
    model.config.id2label = dict(enumerate(LABELS))  # SigLIP's is saved with its head
    bare = getattr(model, model.base_model_prefix) if name not in CAUSAL and "Siglip" not in ALL[name][0] else model
    bare.save_pretrained(folder)
    if name in IMAGES:
        side = 32 if name in ("Swin", "ConvNeXt") else 28
        processor: Any = hf.ViTImageProcessor(size={"height": side, "width": side})
        if name == "SigLIP 2":
            processor = hf.Siglip2ImageProcessor(patch_size=14, max_num_patches=4)
        processor.save_pretrained(folder)
    else:
        make_tokenizer().save_pretrained(folder)
    return folder


def batch_of(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in IMAGES:
        side = 32 if name in ("Swin", "ConvNeXt") else 28
        batch = {"pixel_values": torch.rand(2, 3, side, side, generator=generator)}
        if name == "SigLIP 2":
            patches = torch.rand(2, 4, 588, generator=generator)
            shapes = torch.tensor([[2, 2]] * 2)
            batch = {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 4), "spatial_shapes": shapes}
        return {**batch, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 300, (2, 8), generator=generator)
    if name in CAUSAL:
        return collate([Example(row, 1) for row in ids.tolist()], 0)
    return {**padded(ids.tolist(), 0), "labels": torch.tensor([0, 1])}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key not in ("labels", "sources")}).logits


TRAINING = TrainingConfig(learning_rate=0.05, local_steps=1, batch_size=2)


def a_round(name: str, model: nn.Module, settings: Any, task: Task[Any]) -> nn.Module:
    """The model after a round of two clients; every tensor that the round trains has moved."""
    tuned = tune(model, settings, task.peft_type)
    state, rule = first_state(tuned, settings, 0), make_rule(settings, seed=0)
    active, batch = rule.active(1, state), batch_of(name, model)
    updates = []
    for client in ("a", "b"):
        tuned.set(state)
        optimizer = make_optimizer(tuned.parameters, TRAINING, settings, 1, None, None)
        for _ in range(2):  # B = 0 gives A no gradient in the first step
            optimizer.zero_grad()
            loss, counted = task.loss_sum(tuned.model, batch)
            (loss / counted).backward()
            optimizer.step()
        trained = tuned.get()
        updates.append(Update(client, 2, {key: trained[key] for key in active}, getattr(settings, "lora_alpha", None)))
    after = rule.aggregate(1, state, iter(updates)).state
    still = [key for key in active if torch.equal(after[key], state[key])]
    assert still == []
    tuned.set(after)
    return tuned.model.eval()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ALL]
)
def test_round_of_both_kinds_is_exported_to_what_loads_again(tmp_path: Path, name: str) -> None:
    task = task_of(name)
    base: Any = task.load(str(saved(name, tmp_path / "base")), None, "float32", 0).model
    if name in CAUSAL:
        check_length(base, 60)
    auto = getattr(hf, task.auto_class)
    head, batch = (None if name in CAUSAL else "train"), batch_of(name, base)
    before = logits(base, batch)
    modules = "linear"
    weights: Any = a_round(name, copy.deepcopy(base), FedFTGConfig(modules=modules, rank=4, head=head), task)
    weights.save_pretrained(tmp_path / "weights")
    again = auto.from_pretrained(tmp_path / "weights").eval()
    torch.testing.assert_close(logits(again, batch), logits(weights, batch))
    assert not torch.allclose(before, logits(again, batch), atol=1e-3)
    adapted: Any = a_round(name, copy.deepcopy(base), FedITConfig(modules=modules, rank=2, head=head), task)
    adapted.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    plain = auto.from_pretrained(tmp_path / "base", config=hf.AutoConfig.from_pretrained(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(adapted, batch))
    assert not torch.allclose(before, logits(loaded, batch), atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_experts_are_refused_by_name_and_their_attention_is_not(name: str) -> None:
    model = build(name)
    for modules in ("mlp", "linear"):
        with pytest.raises(ModelError, match=r"mixture of experts \(model.layers.0.mlp.experts\).*modules: attention"):
            select(model, modules, "all")
    assert len(select(model, "attention", "all")) == 12


def table() -> str:
    """The page's table, of the models themselves."""
    lines = ["| model | `model_type` | blocks | `attention` | `mlp` |", "|---|---|---|---|---|"]
    for name in (*ALL, *REFUSED):
        model = build(name)
        blocks = blocks_of(model)
        names = [layer for layer, _ in linear_layers(blocks[0][1])]
        groups = [", ".join(n for n in names if group_of(n) == group) or "-" for group in ("attention", "mlp")]
        if name in REFUSED:
            groups[1] = "refused: a mixture of experts"
        stages = len({path.rpartition(".")[0] for path, _ in blocks})
        where = blocks[0][0].rpartition(".")[0] + (f" and {stages - 1} more" if stages > 1 else "")
        lines.append(f"| {name} | {kind_of(model)} | {where} | {groups[0]} | {groups[1]} |")
    return "\n".join(lines) + "\n"


def test_page_of_architectures_is_what_the_models_have() -> None:
    assert PAGE.read_text().endswith("\n\n" + table())


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition("| model |")[0] + table())
