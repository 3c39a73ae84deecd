"""Peak memory of training, computed without training (decision 015).

The sizes of weights, gradients and optimizer state follow from shapes. The memory of a forward and backward pass
depends on the family, the trained tensors, autocast and checkpointing. So one pass runs on tensors with shapes but
without values (``FakeTensorMode``, with which ``torch.compile`` traces), and the live bytes are counted: exact for
every family, without memory or arithmetic.
"""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from client.training.settings import state_bytes
from client.training.split import Places
from common.config.federation import FederationConfig
from common.config.strategy import StrategyConfig
from common.config.training import TrainingConfig
from common.data.chat import counted_logits
from common.model.quantization import is_quantized, whole_sizes
from common.model.tuning import Tuned

# Measured: decision 015.
_PROCESS = 500_000_000  # a worker with Python, PyTorch, transformers and Flower, before it holds a model
_PEFT = 50_000_000
_ALLOCATOR = 1.2  # memory that the allocator holds for temporary tensors, divided by the tensors' live bytes
_PER_TOKEN = 36  # bytes of a token on the host: a Python int, and the list's pointer to the int


@dataclass(frozen=True)
class Batch:
    """The largest batch that the shard can give.

    Attributes:
        rows: rows in one forward pass.
        width: tokens of the longest row; 0 for images.
        counted: share of the tokens that the loss counts.
        pixels: shape of the model's input image, (channels, height, width); empty for text.
    """

    rows: int
    width: int
    counted: float = 1.0
    pixels: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.pixels:
            return f"{self.rows} image(s) of {' x '.join(map(str, self.pixels))}"
        return f"{self.rows} row(s) of {self.width} tokens"


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of training.

    Attributes:
        weights: the complete model.
        state: the optimizer's state, copies of trained tensors included.
        gradients: gradients that are kept to the end of a step.
        passes: additional memory of a forward and backward pass.
    """

    weights: int
    state: int
    gradients: int
    passes: int

    @property
    def total(self) -> int:
        """The sum, on the device."""
        return self.weights + self.state + self.gradients + self.passes


def host_bytes(tuned: Tuned, strategy: StrategyConfig, tokens: int, weights: int, processes: int = 1) -> int:
    """Bytes that a site's processes hold on the host, beside training on the CPU.

    Args:
        tuned: the model.
        strategy: the federation's strategy section.
        tokens: number of tokens of all training rows.
        weights: bytes of the model on the host, in each process; 0 when they are counted elsewhere.
        processes: one for every device.
    """
    kept = 4 * sum(p.numel() for p in tuned.parameters.values()) if strategy.trains == "weights" else _PEFT
    return kept + processes * (_PROCESS + _PER_TOKEN * tokens + weights)


def whole_bytes(tuned: Tuned, strategy: StrategyConfig) -> int:
    """Bytes of the whole model that a site with a base in codes reads to write a complete model; 0: it reads none."""
    if not strategy.changes_base or not is_quantized(tuned.model):
        return 0
    return sum(number * size for number, size in whole_sizes(tuned.model))


def estimate(
    tuned: Tuned, federation: FederationConfig, batch: Batch, steps: int, autocast: torch.dtype | None
) -> Peak:
    """The peak of a round of training on one device; see ``estimates``."""
    (peak,) = estimates(tuned, federation, batch, steps, autocast, {}).values()
    return peak


def estimates(
    tuned: Tuned,
    federation: FederationConfig,
    batch: Batch,
    steps: int,
    autocast: torch.dtype | None,
    where: Places,
) -> dict[torch.device | None, Peak]:
    """The peak of a round of training on each device of a model that is split.

    Args:
        tuned: the model, on any device; not changed.
        federation: the federation's settings.
        batch: the largest batch; with fewer rows than ``training.batch_size`` a step has several passes.
        steps: optimizer steps per round.
        autocast: dtype of forward and backward.
        where: the device of each part of the model; empty: all is on one device, which the result calls None.
    """
    training, strategy = federation.training, federation.strategy
    trained = {**tuned.parameters, **tuned.local}
    several = batch.rows < training.batch_size * training.gradient_accumulation
    freed = strategy.trains == "weights" and autocast != torch.float16
    kept, bases = several, 1  # gradients of a step's passes
    if strategy.trains == "weights":
        bases = strategy.bases(steps)
        kept = freed and (several or strategy.refresh_batches > 1)  # a refresh needs the complete gradient
    device_of = {id(p): device for path, device in where.items() for p in tuned.model.get_submodule(path).parameters()}
    state, gradients = Counter[torch.device | None](), Counter[torch.device | None]()
    for name, parameter in trained.items():
        state[device_of.get(id(parameter))] += state_bytes(name, parameter, strategy, training, bases)
        gradients[device_of.get(id(parameter))] += parameter.nbytes if kept else 0
    traced = _trace(tuned, trained, training, batch, autocast, where, freed=freed)
    return {
        device: Peak(weights, state[device], gradients[device], int(_ALLOCATOR * passes))
        for device, (weights, passes) in traced.items()
    }


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive, by device.

    Attributes:
        at: the device that the model's present part is on.
        peak: most bytes at a time on each device.
    """

    def __init__(self, first: torch.device | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.peak = first, Counter[torch.device | None]({first: 0})
        self._bytes, self._known = Counter[torch.device | None](), set[int]()

    def follow(self, part: nn.Module, device: torch.device) -> None:
        """Count what a part of the model makes, forward and backward, as on a device."""

        def here(*_: object) -> None:
            self.at = device

        def out(module: nn.Module, args: object, output: object) -> None:
            del module, args
            here()  # after parts within it
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(here)

        part.register_forward_pre_hook(here)
        part.register_forward_hook(out)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operation and count the tensors that it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return made

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._bytes[self.at] += size
        self.peak[self.at] = max(self.peak[self.at], self._bytes[self.at])
        weakref.finalize(storage, self._forget, key, self.at, size)

    def _forget(self, key: int, at: torch.device | None, size: int) -> None:
        self._known.discard(key)
        self._bytes[at] -= size


def _trace(
    tuned: Tuned,
    trained: Mapping[str, nn.Parameter],
    training: TrainingConfig,
    batch: Batch,
    autocast: torch.dtype | None,
    where: Places,
    *,
    freed: bool,
) -> dict[torch.device | None, tuple[int, int]]:
    """Bytes of the weights on each device, and bytes that a forward and backward pass adds there; as on a CPU."""
    owned = {id(parameter) for parameter in trained.values()}
    names = [name for name, parameter in tuned.model.named_parameters() if id(parameter) in owned]
    model: Any = tuned.model
    first, alive = next(model.parameters()), _Alive(next(iter(where.values()), None))
    if isinstance(first, FakeTensor):  # a model of shapes alone, which nobody trains
        fake = first.fake_mode
    else:
        fake = FakeTensorMode()
        with FakeCopyMode(fake):
            model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for path, device in where.items():
        alive.at, part = device, model.get_submodule(path)
        alive.follow(part, device)
        for tensor in (*part.parameters(), *part.buffers()):
            alive.add(tensor)
    alive.at = next(iter(where.values()), None)
    for tensor in (*parameters.values(), *model.buffers()):
        tensor.requires_grad_(False)
        alive.add(tensor)
    for name in names:
        parameters[name].requires_grad_(True)
        if freed:
            parameters[name].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    weights = alive.peak.copy()
    with fake, alive:
        ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if batch.pixels:
            inputs = {"pixel_values": torch.zeros(batch.rows, *batch.pixels)}
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = _loss(model, inputs, batch)
        loss.backward()
    return {device: (weights[device], peak - weights[device]) for device, peak in alive.peak.items()}


def _loss(model: Any, inputs: Mapping[str, Tensor], batch: Batch) -> Tensor:  # noqa: ANN401
    """The loss as in ``common.data.tasks``, but without counting labels: fake tensors have no values to count."""
    if model.get_output_embeddings() is None:
        logits = model(**inputs).logits
    else:  # a language model
        counted = max(1, math.ceil(batch.counted * batch.width * batch.rows))
        logits = counted_logits(model, {**inputs, "sources": torch.zeros(counted, dtype=torch.long)})
    return functional.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long), reduction="sum")
