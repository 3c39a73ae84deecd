"""One round of local training: the whole loop on one page. No Flower."""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from client.training.galore import GaLore
from common.config.training import TrainingConfig
from common.errors import DivergedError, TrainingError
from common.system.machine import attempt, release

E = TypeVar("E")
Batch = dict[str, Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Result of one round of local training.

    Attributes:
        loss: mean loss over all steps, in nats per counted token (or row).
        loss_first: loss of the first step.
        loss_last: loss of the last step.
        steps: number of optimizer steps.
        tokens: number of input tokens that went through the model, without padding; for images, number of images.
        seconds: wall-clock time of the loop.
        learning_rate: learning rate of the last step.
        peak_memory_bytes: peak memory on the CUDA device; 0 on a CPU.
        micro_batch: rows per forward pass at the end; fewer than at the start when memory ran out.
        not_finite: losses and gradients that were not finite and counted as zero.
    """

    loss: float
    loss_first: float
    loss_last: float
    steps: int
    tokens: int
    seconds: float
    learning_rate: float
    peak_memory_bytes: int
    micro_batch: int
    not_finite: int = 0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[E],
    collate: Callable[[list[E]], Batch],
    loss_sum: Callable[[nn.Module, Batch], tuple[Tensor, int]],
    config: TrainingConfig,
    *,
    server_round: int,
    rounds: int,
    max_batch_size: int | None,
    device: torch.device,
    autocast: torch.dtype | None,
    seed: str,
    go_on: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train for one round.

    When memory runs out, the step is repeated with half as many rows per forward pass; the smaller number stays for the
    rest of the round. The step's rows and its result are the same.

    Args:
        model: already on ``device``; only parameters with ``requires_grad`` are in ``optimizer``.
        optimizer: built for this round's trained parameters.
        examples: the site's encoded training rows.
        collate: makes a padded batch of examples.
        loss_sum: gives a batch's summed loss and the number of tokens (rows) it counts.
        config: the federation's training section.
        server_round: Flower's round, from 1; with ``rounds`` it places this round in the schedule.
        rounds: number of rounds of the whole run.
        max_batch_size: the site's cap on rows per forward pass.
        device: the model's device.
        autocast: dtype of forward and backward; None: the weights' own.
        seed: seed for the order of rows.
        go_on: count a loss or gradient that is not finite as zero, and let every parameter take part in every step; so
            neither an error nor a weight's decay tells of a row.
        on_step: called after every step, with the number of steps done and of all.

    Raises:
        DivergedError: the loss is not finite.
        TrainingError: memory runs out with one row per forward pass, or ``precision`` float16 meets float16 weights.
    """
    micro = min(config.batch_size, max_batch_size or config.batch_size)
    steps = config.steps(len(examples))
    order = _shuffled(len(examples), config.rows_per_step, seed, carry_over=config.local_steps is not None)
    peak = _base_rates(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    galore = optimizer if isinstance(optimizer, GaLore) else None
    if scaler.is_enabled() and any(p.dtype == torch.float16 for p in parameters):
        raise TrainingError(
            "`precision` float16 scales gradients, which float16 weights do not allow; allowed with `model.dtype` "
            "float16: `precision` float32 or bfloat16; with `precision` float16: `model.dtype` float32"
        )
    watch = _Watch(optimizer, parameters) if go_on else None
    passes = _Passes(model, collate, loss_sum, scaler, device, autocast, micro, config.max_length, optimizer, watch)
    for_bases = _shuffled(len(examples), config.rows_per_step, f"{seed}/bases", carry_over=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    with nullcontext() if watch is None else watch:
        for step, factor in enumerate(schedule(config, server_round, rounds, steps)):
            for group, rate in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * factor
            place = f"round {server_round}, step {step + 1}"
            optimizer.zero_grad(set_to_none=True)
            if galore is not None and galore.refresh_batches > 1 and galore.refresh_due():
                batches = [[examples[i] for i in next(for_bases)] for _ in range(galore.refresh_batches)]
                _refresh(galore, passes, batches, place)
            rows = [examples[i] for i in next(order)]
            # A gradient scaler must see gradients before they are projected, so nothing is projected in backward.
            with galore.projecting() if galore is not None and not scaler.is_enabled() else nullcontext():
                loss = passes.backward([rows], place)
            if watch is not None:
                watch.fill()
            scaler.unscale_(optimizer)
            if config.max_grad_norm is not None and galore is None:  # GaLore clips the projected gradients itself
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss)
            if on_step is not None:
                on_step(step + 1, steps)
    optimizer.zero_grad(set_to_none=True)
    model.train(False)
    return TrainResult(
        loss=sum(losses) / len(losses),
        loss_first=losses[0],
        loss_last=losses[-1],
        steps=steps,
        tokens=passes.tokens,
        seconds=time.monotonic() - started,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        micro_batch=passes.micro,
        not_finite=0 if watch is None else watch.found,
    )


class _Watch:
    """Sees that a step has every gradient, and none that is not finite; ``found``: losses and gradients that were."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self.found, self._optimizer, self._parameters = 0, optimizer, parameters

    def __enter__(self) -> None:
        self._hooks = [p.register_post_accumulate_grad_hook(self._look) for p in self._parameters]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, parameter: Tensor) -> None:  # as soon as a gradient is there, before GaLore projects it
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            parameter.grad.zero_()
            self.found += 1

    def fill(self) -> None:
        """Give a zero to parameters that got no gradient, because a loss was left out or no row reached them."""
        for parameter in self._parameters:
            if parameter.grad is None and "low" not in self._optimizer.state.get(parameter, {}):
                parameter.grad = torch.zeros_like(parameter)


class _Passes(Generic[E]):
    """Forward and backward passes over rows, in micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[list[E]], Batch],
        loss_sum: Callable[[nn.Module, Batch], tuple[Tensor, int]],
        scaler: torch.amp.GradScaler,
        device: torch.device,
        autocast: torch.dtype | None,
        micro: int,
        max_length: int,
        optimizer: torch.optim.Optimizer,
        watch: _Watch | None,
    ) -> None:
        self._watch = watch
        self.tokens, self.micro, self.scaler = 0, micro, scaler
        self._model, self._collate, self._loss_sum = model, collate, loss_sum
        self._device, self._autocast, self._max_length, self._optimizer = device, autocast, max_length, optimizer

    def backward(self, batches: list[list[E]], place: str) -> float:
        """Compute the gradient of the sum of each batch's mean loss; return the sum. No gradients may exist before.

        Raises:
            DivergedError: the loss is not finite; the text names ``place``.
            TrainingError: a single row does not fit into memory; the text names ``place``.
        """
        while (done := attempt(lambda: self._backward(batches, place))) is None:
            most = min(self.micro, max(len(rows) for rows in batches))
            if most == 1:
                raise TrainingError(
                    f"out of memory in {place}: one row of up to {self._max_length} tokens does not fit on "
                    f"{self._device}; lower training.max_length or strategy.rank, set training.gradient_checkpointing, "
                    "or take a larger device"
                )
            self.micro = most // 2
            log.warning("out of memory in %s; from now on %d row(s) per forward pass", place, self.micro)
            # A basis that GaLore computed in the failed attempt stays: it came from a complete gradient, and the
            # repeated attempt computes the same gradient.
            self._optimizer.zero_grad(set_to_none=True)
            release()
        loss, tokens = done
        self.tokens += tokens
        return loss

    def _backward(self, batches: list[list[E]], place: str) -> tuple[float, int]:
        """One attempt: the loss, and the number of input tokens that went through the model."""
        loss, tokens = 0.0, 0
        for rows in batches:
            parts = [self._collate(rows[i : i + self.micro]) for i in range(0, len(rows), self.micro)]
            counted = max(sum(int((part["labels"] != -100).sum()) for part in parts), 1)
            for number, part in enumerate(parts, start=1):
                if isinstance(self._optimizer, GaLore):
                    self._optimizer.last_backward = number == len(parts)
                on_device = {key: value.to(self._device) for key, value in part.items()}
                with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                    summed, _ = self._loss_sum(self._model, on_device)
                so_far = loss + float(summed.detach()) / counted
                if math.isfinite(so_far):
                    loss = so_far
                    self.scaler.scale(summed / counted).backward()
                elif self._watch is not None:
                    self._watch.found += 1
                else:
                    raise DivergedError(f"loss is {so_far} in {place}; lower training.learning_rate")
                tokens += int(part["attention_mask"].sum()) if "attention_mask" in part else len(part["labels"])
        return loss, tokens


def _refresh(galore: GaLore, passes: _Passes[E], batches: list[list[E]], place: str) -> None:
    """Compute new bases from these batches; when scaled gradients overflow, try again at a lower scale.

    Raises:
        TrainingError: see ``_Passes.backward`` and ``GaLore.refresh``.
    """
    while True:
        passes.backward(batches, place)
        if not passes.scaler.is_enabled():
            break
        scale = passes.scaler.get_scale()
        passes.scaler.unscale_(galore)
        passes.scaler.update()
        if passes.scaler.get_scale() >= scale or scale < 1.0:
            break
        galore.zero_grad()
    galore.refresh()


def schedule(config: TrainingConfig, server_round: int, rounds: int, steps: int) -> list[float]:
    """Share of the peak learning rate in every step of a round."""
    return [schedule_factor(config, (server_round - 1 + step / steps) / rounds) for step in range(steps)]


def schedule_factor(config: TrainingConfig, progress: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1) of the whole run, all rounds together."""
    if progress < config.warmup:
        return max(progress / config.warmup, 1e-3)  # the first step of a warm-up still moves
    rest = (progress - config.warmup) / (1 - config.warmup)
    return {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[config.schedule]


def _base_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each group's peak rate, as it was when the optimizer was built."""
    return [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]


def _shuffled(rows: int, size: int, seed: str, *, carry_over: bool) -> Iterator[list[int]]:
    """Row numbers of one optimizer step after another, each pass in a new order.

    With ``carry_over`` every step has ``size`` rows and may span two passes; without, a pass's last step has the rest.
    """
    generator = random.Random(seed)  # noqa: S311 - an order, not a secret
    queue: list[int] = []
    while True:
        if not queue or (carry_over and len(queue) < size):
            queue += generator.sample(range(rows), rows)
            continue
        yield queue[:size]
        queue = queue[size:]
