"""Packed rows: the same loss and gradients as row by row, for every family that can; the others are told apart."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn import functional

from common.data.chat import Example, causal_loss_sum, collate, counted_logits
from common.data.packing import Packing, choose, pack, packing_of
from common.errors import ModelError
from tests.common.model.test_architectures import CAUSAL, HEADS, REFUSED, TEXT, build

BEGIN = [5, 9, 7, 30]  # of every row, as a system message would be
ROWS = [
    Example([*BEGIN, *range(40, 45)], 7),
    Example([*BEGIN, *range(50, 59)], 10, ((4, 6),)),
    Example([*BEGIN, 60, 61], 4),  # its first counted token is predicted by the beginning that all share
    Example([*BEGIN, *range(50, 62)], 12),
    Example([*BEGIN, *range(50, 55)], 8),  # a beginning of another row
]
SHARING = Packing(additive=False, share=True, window=None)
QUICK = ("Llama", "Qwen 3", "Gemma 2", "Gemma 3, text", "GPT-2", "GPT-NeoX, Pythia", "OPT", "Granite")
EXTRA = {
    "Cohere": ("CohereForCausalLM", "CohereConfig", {**HEADS, "logit_scale": 0.3}),
    "Scaled Granite": ("GraniteForCausalLM", "GraniteConfig", {"num_key_value_heads": 2, "logits_scaling": 3.0}),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "GPT-Neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {"num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 4}),
    "MPT": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "Falcon with ALiBi": ("FalconForCausalLM", "FalconConfig", {"alibi": True}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    "LFM 2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2},
    ),
}
NEVER = ("Bloom", "MPT", "Falcon with ALiBi", "Mamba", "LFM 2")
EXTRA_SIZES = {**TEXT, "num_hidden_layers": 4, "bos_token_id": 0}


def made(name: str) -> Any:
    """A tiny model of the family, without dropout."""
    if name in EXTRA:
        cls, config, sizes = EXTRA[name]
        named = (
            {**EXTRA_SIZES, **sizes}
            if "d_model" not in sizes and "n_embd" not in sizes
            else {"vocab_size": 320, **sizes}
        )
        if name == "GPT-Neo":
            named |= {"num_layers": 2}
            del named["num_hidden_layers"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(hf, cls)(getattr(hf, config)(**named))
    else:
        model = build(name)
    for key in [key for key in model.config.get_text_config().to_dict() if "drop" in key]:
        setattr(model.config.get_text_config(), key, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def row_by_row(model: Any, rows: Sequence[Example]) -> Tensor:
    """The summed loss, from the model's own logits of every row by itself."""
    total = torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for start, end in row.counted():
            wanted = torch.tensor(row.input_ids[start:end])
            total = total + functional.cross_entropy(logits[start - 1 : end - 1], wanted, reduction="sum")
    return total


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


FAMILIES = [*CAUSAL, *REFUSED, *(name for name in EXTRA if name not in NEVER)]


@pytest.mark.parametrize(
    "name", [name if name in (*QUICK, "Cohere") else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_loss_and_gradient_are_those_of_the_rows_one_by_one(name: str) -> None:
    model = made(name)
    packing = packing_of(model, None)
    assert packing.share
    if name not in REFUSED:  # PyTorch's experts know no float64
        model.double()
    expected = row_by_row(model, ROWS)
    wanted = gradient(model, expected)
    for way in (None, replace(packing, share=False), packing):
        batch = collate(ROWS, 0, way)
        assert ("position_ids" in batch) == (way is not None)
        loss, counted = causal_loss_sum(model, batch)
        assert counted == sum(end - start for row in ROWS for start, end in row.counted())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        found = gradient(model, loss)
        assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if name in REFUSED else 1e-6)


@pytest.mark.parametrize("name", ["Gemma 2", "Scaled Granite", "Cohere"])
def test_what_a_family_does_to_its_logits_is_done(name: str) -> None:
    """A cap or a scale comes after the output embedding; without it the loss would be another one."""
    model = made(name)
    batch = collate(ROWS, 0)
    with torch.no_grad():
        hidden: list[Tensor] = []
        hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: hidden.append(out[0]))
        logits = counted_logits(model, batch)
        hook.remove()
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert hidden[0].shape == logits.shape == (len(batch["labels"]), 320)
    torch.testing.assert_close(logits, whole.flatten(0, 1)[batch["sources"]])
    assert not torch.allclose(logits, hidden[0], rtol=1e-2)


def test_model_without_an_output_embedding_gives_its_logits_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made("Llama"), collate(ROWS, 0)
    with torch.no_grad():
        expected = counted_logits(model, batch)
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
        torch.testing.assert_close(counted_logits(model, batch), expected)


@pytest.mark.parametrize("name", NEVER)
def test_model_that_cannot_pack_is_padded_or_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = made(name)
    with caplog.at_level(logging.INFO, "common.data.packing"):
        assert choose(model, "auto", None, packs=True) is None
    assert caplog.messages[-1].startswith(f"rows are padded: this {model.config.model_type} model takes no packed rows")
    refused = r"`training.packing` is on, but this \w+ model takes no packed rows.*; allowed here: auto, off$"
    with pytest.raises(ModelError, match=refused):
        choose(model, "on", None, packs=True)
    assert choose(model, "off", None, packs=True) is None


def test_other_tasks_pack_nothing() -> None:
    model = made("Llama")
    assert choose(model, "auto", None, packs=False) is None
    with pytest.raises(ModelError, match=r"`training.packing` is on, but only the task causal-lm packs rows"):
        choose(model, "on", None, packs=False)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_model_in_bfloat16_is_known_to_pack(autocast: torch.dtype | None) -> None:
    assert packing_of(made("Llama") if autocast else made("Llama").bfloat16(), autocast).share


def test_probe_leaves_the_model_in_its_mode() -> None:
    for training in (True, False):
        model = made("Llama").train(training)
        packing_of(model, None)
        assert model.training == training


def test_with_dropout_no_beginning_is_shared() -> None:
    """It must fall on every row by itself."""
    assert not packing_of(build("GPT-2"), None).share
    llama = made("Llama")
    llama.model.layers[0].add_module("lora_dropout", nn.Dropout(0.1))
    assert not packing_of(llama, None).share


def test_window_of_attention_limits_a_packed_row() -> None:
    mistral = hf.MistralForCausalLM(hf.MistralConfig(**HEADS, sliding_window=20)).eval()
    packing = packing_of(mistral, None)
    assert packing.window == 20
    batch = pack(ROWS, 0, packing)
    assert batch is not None
    assert batch["input_ids"].shape[1] <= 20
    assert pack([*ROWS, Example(list(range(10, 31)), 3)], 0, packing) is None  # padded, as the model would see it


def test_beginnings_and_equal_rows_stand_once_and_count_every_time() -> None:
    twice = [ROWS[0], ROWS[0], ROWS[2]]
    batch = pack(twice, 0, SHARING)
    assert batch is not None
    assert batch["input_ids"].tolist() == [[*ROWS[0].input_ids, 60, 61]]
    assert batch["position_ids"].tolist() == [[*range(9), 4, 5]]
    assert int(batch["tokens"]) == 9 + 9 + 6
    assert batch["labels"].tolist() == [43, 44, 43, 44, 60, 61]
    assert batch["sources"].tolist() == [6, 7, 6, 7, 3, 9]


tokens = st.lists(st.integers(1, 3), min_size=1, max_size=12)


@given(st.lists(tokens, min_size=1, max_size=9), st.booleans(), st.none() | st.integers(4, 20))
def test_every_token_sees_its_own_row_and_nothing_else(ids: list[list[int]], share: bool, window: int | None) -> None:
    rows = [Example(row, min(1, len(row) - 1)) for row in ids]
    batch = pack(rows, 0, Packing(additive=False, share=share, window=window))
    plain = collate(rows, 0)
    if batch is None:
        return
    lines, width = batch["input_ids"].shape
    assert lines * width < plain["input_ids"].numel()
    assert width <= max(window or 512, 1)
    assert torch.equal(batch["labels"], plain["labels"])
    at = iter(batch["sources"].tolist())
    for row in ids:
        for place in range(1, len(row)):
            line, column = divmod(next(at), width)
            seen = batch["attention_mask"][line, 0, column].nonzero().flatten()
            assert batch["input_ids"][line, seen].tolist() == row[:place]
            assert batch["position_ids"][line, seen].tolist() == list(range(place))
    assert next(at, None) is None
    again = pack(rows, 0, Packing(additive=False, share=share, window=window))
    assert again is not None
    assert all(torch.equal(batch[key], again[key]) for key in batch)
