"""One round of local training: the whole loop on one page. No Flower."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from client.training.direct import layers_of
from client.training.galore import GaLore
from client.training.passes import Batch, Passes, Watch
from client.training.ranks import Ranks
from common.config.training import TrainingConfig
from common.errors import TrainingError

E = TypeVar("E")


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
        peak_memory_bytes: peak memory on the CUDA device, with several the largest; 0 on a CPU.
        micro_batch: rows per forward pass at the end, with several devices the fewest; fewer than at the start when
            memory ran out.
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
    ranks: Ranks,
    autocast: torch.dtype | None,
    seed: str,
    go_on: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train for one round.

    When memory runs out, the step is repeated with half as many rows per forward pass; the smaller number stays for the
    rest of the round. The step's rows and its result are the same.

    Args:
        model: already on its device; only parameters with ``requires_grad`` are in ``optimizer``.
        optimizer: built for this round's trained parameters.
        examples: the site's encoded training rows.
        collate: makes a padded batch of examples.
        loss_sum: gives a batch's summed loss and the number of tokens (rows) it counts.
        config: the federation's training section.
        server_round: Flower's round, from 1; with ``rounds`` it places this round in the schedule.
        rounds: number of rounds of the whole run.
        max_batch_size: the site's cap on rows per forward pass.
        ranks: the processes that train together, each with such a call; the model is on this rank's device.
        autocast: dtype of forward and backward; None: the weights' own.
        seed: seed for the order of rows.
        go_on: count a loss or gradient that is not finite as zero, and let every parameter take part in every step; so
            neither an error nor a weight's decay tells of a row.
        on_step: called after every step, with the number of steps done and of all.

    Raises:
        DivergedError: the loss is not finite.
        TrainingError: memory runs out with one row per forward pass, ``precision`` float16 meets float16 weights, or
            the ranks' copies of the model differ after the round.
        WorkerDied: another rank is lost.
    """
    device = ranks.devices[ranks.rank]
    micro = min(config.batch_size, max_batch_size or config.batch_size)
    steps = config.steps(len(examples))
    order = _shuffled(len(examples), config.rows_per_step, seed, carry_over=config.local_steps is not None)
    rates = _base_rates(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    galore = optimizer if isinstance(optimizer, GaLore) else None
    if scaler.is_enabled() and any(p.dtype == torch.float16 for p in parameters):
        raise TrainingError(
            "`precision` float16 scales gradients, which float16 weights do not allow; allowed with `model.dtype` "
            "float16: `precision` float32 or bfloat16; with `precision` float16: `model.dtype` float32"
        )
    watch = Watch(optimizer, parameters) if go_on else None
    if galore is not None and watch is None and autocast is None:  # a watch looks at whole gradients
        galore.layers = layers_of(model, set(parameters))
    passes = Passes(model, collate, loss_sum, scaler, ranks, autocast, micro, config.max_length, optimizer, watch)
    for_bases = _shuffled(len(examples), config.rows_per_step, f"{seed}/bases", carry_over=True)
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    with nullcontext() if watch is None else watch:
        for step, factor in enumerate(schedule(config, server_round, rounds, steps)):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
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
    tokens, peak_memory, micro, not_finite = passes.totals(f"after round {server_round}")
    return TrainResult(
        loss=sum(losses) / len(losses),
        loss_first=losses[0],
        loss_last=losses[-1],
        steps=steps,
        tokens=tokens,
        seconds=time.monotonic() - started,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        peak_memory_bytes=peak_memory,
        micro_batch=micro,
        not_finite=not_finite,
    )


def _refresh(galore: GaLore, passes: Passes[E], batches: list[list[E]], place: str) -> None:
    """Compute new bases from these batches; when scaled gradients overflow, try again at a lower scale.

    Raises:
        TrainingError: see ``Passes.backward`` and ``GaLore.refresh``.
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
