"""Peak memory of training, computed without training (decision 015).

The sizes of weights, gradients and optimizer state follow from shapes. The memory of a forward and backward pass
depends on the family, the trained tensors, autocast and checkpointing. So one pass runs on tensors with shapes but
without values (``FakeTensorMode``, with which ``torch.compile`` traces), and the live bytes are counted: exact for
every family, without memory or arithmetic.
"""

import copy
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.config.federation import FederationConfig
from common.config.galore import GaLoreConfig
from common.config.strategy import StrategyConfig
from common.config.training import TrainingConfig
from common.data.chat import counted_logits
from common.model.quantization import is_quantized, whole_sizes
from common.model.tuning import Tuned
from common.protocol.factors import num_bytes

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
    """The peak of a round of training.

    Args:
        tuned: the model, on any device; not changed.
        federation: the federation's settings.
        batch: the largest batch; with fewer rows than ``training.batch_size`` a step has several passes.
        steps: optimizer steps per round.
        autocast: dtype of forward and backward.
    """
    training, strategy = federation.training, federation.strategy
    trained = {**tuned.parameters, **tuned.local}
    several = batch.rows < training.batch_size * training.gradient_accumulation
    freed = strategy.trains == "weights" and autocast != torch.float16
    gradients = 0
    if strategy.trains == "weights":
        bases = strategy.bases(steps)
        state = sum(_galore(n, p, strategy, training, bases) for n, p in trained.items())
        if freed and (several or strategy.refresh_batches > 1):  # a refresh needs the complete gradient
            gradients = num_bytes(trained.values())
    else:
        state = (2 if training.optimizer == "adamw" else 0) * num_bytes(trained.values())
        gradients = num_bytes(trained.values()) if several else 0
    weights, passes = _trace(tuned, trained, training, batch, autocast, freed=freed)
    return Peak(weights, state, gradients, int(_ALLOCATOR * passes))


def _galore(name: str, weight: Tensor, strategy: GaLoreConfig, training: TrainingConfig, terms: int) -> int:
    """Bytes of GaLore's state for one weight: bases and updates of every term, both moments, the projected gradient."""
    if not strategy.projects(name):  # the same sums, without basis, over the complete tensor
        long, short, rank, terms = weight.numel(), 0, 1, 1
    else:
        long, short, rank = max(weight.shape), min(weight.shape), strategy.rank
    moment = {"float32": 4, "8bit": 1}[strategy.moments] if training.optimizer == "adamw" else 0
    state = rank * (4 * terms * (long + short) + 2 * moment * long + 4 * long)
    start = 0 if weight.dtype == torch.float32 else weight.numel() * weight.element_size()
    return state + start


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: set[int] = set()

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
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _trace(
    tuned: Tuned,
    trained: Mapping[str, nn.Parameter],
    training: TrainingConfig,
    batch: Batch,
    autocast: torch.dtype | None,
    *,
    freed: bool,
) -> tuple[int, int]:
    """Bytes of the weights, and the bytes that a forward and backward pass adds; as on a CPU."""
    owned = {id(parameter) for parameter in trained.values()}
    names = [name for name, parameter in tuned.model.named_parameters() if id(parameter) in owned]
    model: Any = tuned.model
    first, alive = next(model.parameters()), _Alive()
    if isinstance(first, FakeTensor):  # a model of shapes alone, which nobody trains
        fake = first.fake_mode
    else:
        fake = FakeTensorMode()
        with FakeCopyMode(fake):
            model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
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
    weights = alive.peak
    with fake, alive:
        ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if batch.pixels:
            inputs = {"pixel_values": torch.zeros(batch.rows, *batch.pixels)}
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = _loss(model, inputs, batch)
        loss.backward()
    return weights, alive.peak - weights


def _loss(model: Any, inputs: Mapping[str, Tensor], batch: Batch) -> Tensor:  # noqa: ANN401
    """The loss as in ``common.data.tasks``, but without counting labels: fake tensors have no values to count."""
    if model.get_output_embeddings() is None:
        logits = model(**inputs).logits
    else:  # a language model
        counted = max(1, math.ceil(batch.counted * batch.width * batch.rows))
        logits = counted_logits(model, {**inputs, "sources": torch.zeros(counted, dtype=torch.long)})
    return functional.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long), reduction="sum")
