"""A model over several devices: which block is where, and that every family computes the same as on one."""

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from hypothesis import given, strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory_table import config_of
from client.training.split import Places, _ends, places, split
from common.errors import ModelError
from tests.common.model.test_architectures import ALL, batch_of, build, task_of
from tests.harness.placed import CPU, several_devices

OTHER = torch.device("cpu", 1)
TWO = [CPU, OTHER]
CUDA = [torch.device("cuda", index) for index in range(4)]
QUICK = ("Llama", "Falcon", "DeBERTa v3", "Swin")  # Falcon's head is tied; Swin has stages of blocks


def llama(blocks: int = 4) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, num_key_value_heads=4, **sizes))


def index(where: Places) -> dict[str, int]:
    return {path: device.index or 0 for path, device in where.items()}


def held(model: nn.Module, where: dict[str, int], devices: int) -> list[int]:
    """Bytes of weights on each device; a tied one is where it comes first."""
    total, seen = [0] * devices, set[int]()
    for path, device in where.items():
        for parameter in model.get_submodule(path).parameters():
            total[device] += 0 if id(parameter) in seen else parameter.nbytes
            seen.add(id(parameter))
    return total


@given(st.lists(st.integers(0, 9), min_size=3, max_size=7), st.lists(st.integers(-5, 30), min_size=2, max_size=3))
def test_fullest_device_has_as_much_room_as_any_runs_would_leave(sizes: list[int], room: list[int]) -> None:
    def left(ends: tuple[int, ...]) -> int:
        starts = (0, *ends)
        return min(r - sum(sizes[a:b]) for r, a, b in zip(room, starts, ends, strict=False))

    every = [(*cuts, len(sizes)) for cuts in combinations(range(1, len(sizes)), len(room) - 1)]
    found = tuple(_ends(sizes, room))
    assert found in every
    assert left(found) == max(map(left, every))


@pytest.mark.parametrize(("shape", "cards"), [("1B", 2), ("8B", 2), ("14B", 4)])
def test_blocks_lie_as_accelerate_would_lay_them_or_more_evenly(shape: str, cards: int) -> None:
    """On cards of 24 GB; a tied head is beside the embeddings."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config_of(shape), dtype=torch.bfloat16)
    room = dict.fromkeys(range(cards), 24 * 10**9)
    whole = ["LlamaDecoderLayer"]
    theirs = infer_auto_device_map(model, get_balanced_memory(model, dict(room), whole), whole)
    ours = index(places(model, CUDA[:cards], list(room.values()), {}))
    assert ours.keys() == theirs.keys()
    assert all(ours[path] == theirs[path] for path in ("model.embed_tokens", "model.norm", "lm_head"))
    at = [ours[f"model.layers.{number}"] for number in range(model.config.num_hidden_layers)]
    assert at == sorted(at)
    assert max(held(model, ours, cards)) <= max(held(model, theirs, cards))
    assert sum(held(model, ours, cards)) == sum(p.nbytes for p in model.parameters())


def test_optimizer_state_and_smaller_cards_move_the_border() -> None:
    model = llama(8)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())

    def first(room: list[int], beside: dict[int, int]) -> int:
        where = index(places(model, TWO, room, beside))
        return sum(where[f"model.layers.{number}"] == 0 for number in range(8))

    assert first([10**9, 10**9], {}) == 4
    assert first([10**9, 10**9 - 4 * block], {}) == 6
    assert first([10**9, 10**9], {id(model.model.layers[0].mlp.up_proj.weight): 4 * block}) == 2


def test_more_devices_than_blocks_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"over 3 devices, but this llama model has 2 block\(s\); allowed: `devices` 2"
    ):
        places(llama(2), CUDA[:3], [1] * 3, {})


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ALL]
)
def test_every_family_has_the_same_loss_and_gradients(name: str) -> None:
    one: Any = build(name)
    for module in one.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    two, task, batch = copy.deepcopy(one), task_of(name), batch_of(name, one)
    loss, _ = task.loss_sum(one, batch)
    loss.backward()
    with several_devices():
        split(two, places(two, TWO, [10**9] * 2, {}))
        assert {parameter.device for parameter in two.parameters()} == set(TWO)
        same, _ = task.loss_sum(two, batch)
        same.backward()
        found = {name: p.grad.to(CPU) for name, p in two.named_parameters() if p.grad is not None}
    assert float(same.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in one.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_block_is_called_with_inputs_that_are_on_its_device(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing keeps random numbers for the device of a block's inputs, so that dropout is drawn again alike."""
    model, calls = llama(), list[tuple[torch.device, torch.device]]()
    kind = type(model.model.layers[0])
    call = kind.__call__

    def watched(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((self.mlp.up_proj.weight.device, hidden.device))
        return call(self, hidden, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", watched)
    with several_devices():
        split(model, places(model, TWO, [10**9] * 2, {}))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert calls == [(CPU, CPU)] * 2 + [(OTHER, OTHER)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_compute_the_same() -> None:
    one = llama().to(CUDA[0]).train()
    two, found = copy.deepcopy(one), []
    split(two, places(two, CUDA[:2], [10**9] * 2, {}))
    for model in (one, two):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=torch.arange(12, device=CUDA[0])[None]).logits.square().sum()
        loss.backward()
        found.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
