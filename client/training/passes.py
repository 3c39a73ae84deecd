"""Forward and backward passes of one optimizer step. No Flower."""

import logging
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from client.training.galore import GaLore
from common.errors import DivergedError, TrainingError
from common.system.machine import attempt, release

E = TypeVar("E")
Batch = dict[str, Tensor]
log = logging.getLogger(__name__)


class Watch:
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


class Passes(Generic[E]):
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
        watch: Watch | None,
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
