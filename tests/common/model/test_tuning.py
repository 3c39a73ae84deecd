"""A trained classification head is float32 under the LoRA strategies, whatever the base model's type."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.strategy import FedExLoRAConfig, FLoRAConfig, RoLoRAConfig
from common.config.traits import LoraConfig
from common.model.tuning import Tuned, first_state, tune
from server.loop.server_model import ServerModel
from server.run.outcome import Outcome
from tests.harness.tiny_images import make_image_federation

_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**_TEXT, num_labels=3)),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**_TEXT, num_labels=3)),
    "llama": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**_TEXT, num_labels=3, num_key_value_heads=2)),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**_IMAGE, intermediate_size=24, num_labels=3)),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**_IMAGE, mlp_ratio=2, num_labels=3)),
}
VISION = ("vit", "dinov2")


def base(family: str, dtype: torch.dtype) -> Any:
    kind, config = MODELS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).to(dtype).eval()


def tuned(family: str, dtype: torch.dtype, config: LoraConfig) -> Tuned:
    return tune(base(family, dtype), config, None if family in VISION else "SEQ_CLS")


def logits(model: Any, family: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if family in VISION:
        found: Tensor = model(pixel_values=torch.randn(4, 3, 16, 16, generator=g)).logits
    else:
        found = model(input_ids=torch.randint(1, 30, (4, 7), generator=g)).logits
    return found


def head(some: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in some.items() if ".lora_" not in name and "base_layer" not in name}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", ["train", "local"])
def test_head_is_trained_in_float32_without_autocast(family: str, dtype: torch.dtype, choice: Any) -> None:
    made = tuned(family, dtype, RoLoRAConfig(rank=2, head=choice))
    trained = head(made.parameters if choice == "train" else made.local)
    assert trained
    assert {p.dtype for p in (made.parameters | made.local).values()} == {torch.float32}
    assert {p.dtype for p in made.model.parameters() if not p.requires_grad} == {dtype}
    got = logits(made.model, family)
    torch.testing.assert_close(got, logits(base(family, dtype), family).float(), rtol=2e-2, atol=2e-2)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(logits(made.model, family).float(), got, rtol=5e-2, atol=5e-2)


def test_small_steps_of_a_head_add_up() -> None:
    """In bfloat16, 50 steps of 2e-5 moved the head of a BERT by 3.2e-4 in the mean."""
    made = tuned("bert", torch.bfloat16, RoLoRAConfig(rank=2, head="train"))
    weight = next(p for name, p in made.parameters.items() if name.endswith("classifier.weight"))
    start = weight.detach().float().clone()
    optimizer = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(start - weight.detach().float(), torch.full_like(start, 1e-3), rtol=1e-2, atol=0)


def test_frozen_head_stays_as_the_model_has_it() -> None:
    made = tuned("bert", torch.bfloat16, RoLoRAConfig(rank=2, head="freeze"))
    heads = [p for name, p in made.model.named_parameters() if "classifier" in name]
    assert {p.dtype for p in heads} == {torch.bfloat16}
    assert not any(p.requires_grad for p in heads)
    assert torch.isfinite(logits(made.model, "bert")).all()


@pytest.mark.parametrize("config", [RoLoRAConfig, FedExLoRAConfig, FLoRAConfig])
def test_first_state_is_what_a_model_takes_and_gives(config: type[LoraConfig]) -> None:
    settings = config(rank=2, head="train")  # type: ignore[call-arg]
    made = tuned("vit", torch.bfloat16, settings)
    state = first_state(made, settings, 0)  # type: ignore[arg-type]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    changed = {name: tensor + 1e-4 for name, tensor in state.items()}  # less than bfloat16 holds beside 1
    made.set(changed)
    again = made.get()
    assert all(torch.equal(again[name], tensor) for name, tensor in head(changed).items())


@pytest.mark.parametrize("strategy", ["rolora", "flora"])
def test_server_evaluates_and_exports_a_model_with_such_a_head(tmp_path: Path, strategy: str) -> None:
    settings = {"name": strategy, "rank": 2, "head": "train", "merge": True}
    file = make_image_federation(
        tmp_path, {"site-a": 2}, model={"path": "model", "dtype": "bfloat16"}, strategy=settings
    )
    server_model = ServerModel(resolved(load(file, FederationConfig), file), file)
    state = server_model.initial_state()
    g = torch.Generator().manual_seed(0)
    state |= {name: torch.randn(tensor.shape, generator=g) for name, tensor in head(state).items()}
    before = server_model.evaluate(state)
    assert 0 < before["loss"] < 100
    server_model.export(state, tmp_path / "model", server_model.card(state, Outcome(1, sites=1)))
    if strategy == "rolora":
        saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
        assert head(saved).keys() == head(state).keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in head(state).items())
    merged = tmp_path / ("merged" if strategy == "rolora" else "model")
    for dtype in ("auto", torch.float32):
        model = hf.AutoModelForImageClassification.from_pretrained(merged, dtype=dtype)
        assert torch.isfinite(model(pixel_values=torch.ones(1, 3, 16, 16, dtype=model.dtype)).logits).all()
        for name in ("classifier.weight", "classifier.bias"):
            sent = next(tensor for key, tensor in state.items() if key.endswith(name))
            torch.testing.assert_close(model.get_parameter(name).float(), sent, rtol=1e-2, atol=1e-2)
