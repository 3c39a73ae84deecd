"""What the preflight says of a model that is to lie on several devices."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from client.preflight import memory
from client.site_model import places_of
from client.training.split import split
from common.config.federation import FederationConfig
from common.data.chat import Example, causal_loss_sum, collate
from common.model.tuning import Tuned, tune
from tests.client.preflight.test_check import Files, files as files, look, output as output
from tests.client.training.test_device import cuda_devices
from tests.harness.placed import CPU, Placed, several_devices

CARDS = [torch.device("cuda", 0), torch.device("cuda", 1)]
TWO = [CPU, torch.device("cpu", 1)]
ROOM = [10**9, 10**9]
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedftg": {"name": "fedftg", "blocks": "lower half", "rank": 4},
    "fedit": {"name": "fedit", "rank": 2},
}


class Living(TorchDispatchMode):
    """Most bytes at a time that operations have made beside a model on each device, by the tensors' own word."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        weights = {_storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.most, self._now, self._known = Counter[torch.device](), Counter[torch.device](), weights

    def __torch_dispatch__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor):
                continue
            storage = _storage(tensor)
            if storage._cdata not in self._known:
                self._add(storage._cdata, tensor.device, storage.nbytes())
                weakref.finalize(storage, self._add, storage._cdata, tensor.device, -storage.nbytes())
        return made

    def _add(self, key: int, device: torch.device, size: int) -> None:
        (self._known.add if size > 0 else self._known.discard)(key)
        self._now[device] += size
        self.most[device] = max(self.most[device], self._now[device])


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.inner if isinstance(tensor, Placed) else tensor).untyped_storage()


def federation(strategy: str, *, checkpointing: bool) -> FederationConfig:
    training = {"learning_rate": 0.1, "local_steps": 1, "batch_size": 4, "gradient_checkpointing": checkpointing}
    return FederationConfig.model_validate(
        {"name": "x", "model": {"path": "x"}, "strategy": STRATEGIES[strategy], "rounds": 1, "training": training}
    )


def made(config: FederationConfig) -> Tuned:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 2000}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, num_key_value_heads=4, **sizes))
    return tune(model, config.strategy, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("strategy", "checkpointing"),
    [
        ("fedftg", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("fedftg", False), ("fedit", False))),
    ],
)
def test_estimate_of_each_device_is_what_lives_there(
    strategy: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside weights; one pass of four rows of 100 tokens."""
    monkeypatch.setattr(memory, "_ALLOCATOR", 1.0)
    config = federation(strategy, checkpointing=checkpointing)
    tuned = made(config)
    where = places_of(tuned, config, TWO, ROOM)
    estimated = memory.estimates(tuned, config, memory.Batch(4, 100, 0.5), 1, None, where)
    batch = collate([Example(list(range(100)), 50)] * 4, 0)
    with several_devices():
        split(tuned.model, where)
        for parameter in tuned.parameters.values():
            if strategy == "fedftg":
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        if checkpointing:
            tuned.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned.model.train()
        with Living(tuned.model) as living:
            causal_loss_sum(tuned.model, batch)[0].backward()
    for device in TWO:
        assert estimated[device].passes == pytest.approx(living.most[device], rel=0.05)


def test_devices_share_weights_and_state() -> None:
    config = federation("fedftg", checkpointing=False)
    tuned, batch = made(config), memory.Batch(4, 100)
    one = memory.estimate(tuned, config, batch, 1, None)
    two = memory.estimates(tuned, config, batch, 1, None, places_of(tuned, config, TWO, ROOM)).values()
    assert sum(peak.weights for peak in two) == one.weights
    assert sum(peak.state for peak in two) == one.state
    assert all(peak.total < 0.75 * one.total for peak in two)


def test_check_tells_what_each_card_needs_and_how_many_rows_fit(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_devices(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    free = {0: 10**9, 1: 10**9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 10**9))
    files.change("site", device="auto", devices=2, split=True, precision="float32")
    assert look("device", files.subject()).found.startswith("one model over 2 x NVIDIA L4 (cuda:0, cuda:1)")
    whole = look("memory", files.subject())
    assert whole.level == "ok"
    assert "on cuda:0 and" in whole.found
    files.change("site", max_batch_size=4)
    subject = files.subject()
    where = places_of(subject.tuned, subject.settings, CARDS, ROOM)
    two = memory.estimates(subject.tuned, subject.settings, subject.largest(2), subject.steps, None, where)
    free = dict.fromkeys(free, two[CARDS[1]].total + 1)
    scarce = look("memory", files.subject())
    assert scarce.level == "warning"
    assert "of cuda:1's memory are free" in scarce.found
    assert scarce.mend == "write `max_batch_size: 2`"
