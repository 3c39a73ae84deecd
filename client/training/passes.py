"""Forward and backward passes of one optimizer step, on one device or several. No Flower."""

import logging
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from client.training.galore import GaLore
from client.training.ranks import Ranks
from common.errors import DivergedError, TrainingError
from common.system.machine import attempt, release

E = TypeVar("E")
Batch = dict[str, Tensor]
_SAME = 1e-6  # relative difference of norms that the last bits of unlike devices may make
log = logging.getLogger(__name__)


class Watch:
    """Sees that a step has every gradient, and none that is not finite."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self._found: dict[torch.device, Tensor] = {}
        self._optimizer, self._parameters = optimizer, parameters

    def __enter__(self) -> None:
        self._hooks = [p.register_post_accumulate_grad_hook(self.look) for p in self._parameters]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def look(self, parameter: Tensor) -> None:
        """Count a gradient that is not finite as zero, before GaLore projects it."""
        if parameter.grad is not None:
            wrong = ~torch.isfinite(parameter.grad).all()  # (), not asked for its value: a GPU would be waited for
            parameter.grad.masked_fill_(wrong, 0.0)
            self.add(wrong)

    def add(self, number: Tensor) -> None:
        """Count so many more, (): on a device of its own each, and not asked for yet."""
        before = self._found.get(number.device)
        self._found[number.device] = number.long() if before is None else before + number.long()

    def found(self) -> int:
        """The number of losses and gradients that were not finite."""
        return sum(map(int, self._found.values()))

    def fill(self) -> None:
        """Give a zero to parameters that got no gradient, because a loss was left out or no row reached them."""
        for parameter in self._parameters:
            if not has_gradient(self._optimizer, parameter):
                parameter.grad = torch.zeros_like(parameter)


def has_gradient(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Whether a parameter has a gradient in this step, complete or projected already."""
    return parameter.grad is not None or "low" in optimizer.state.get(parameter, {})


class Passes(Generic[E]):
    """Forward and backward passes over rows, in micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[list[E]], Batch],
        loss_sum: Callable[[nn.Module, Batch], tuple[Tensor, int]],
        scaler: torch.amp.GradScaler,
        ranks: Ranks,
        autocast: torch.dtype | None,
        micro: int,
        max_length: int,
        optimizer: torch.optim.Optimizer,
        watch: Watch | None,
    ) -> None:
        self._watch, self._ranks, self._device = watch, ranks, ranks.devices[ranks.rank]
        self.tokens, self.micro, self.scaler = 0, micro, scaler
        self._model, self._collate, self._loss_sum = model, collate, loss_sum
        self._autocast, self._max_length, self._optimizer = autocast, max_length, optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._projected = isinstance(optimizer, GaLore) and not scaler.is_enabled()
        if isinstance(optimizer, GaLore):  # gradients that are scaled are summed before they are projected
            optimizer.ranks = ranks if self._projected else Ranks([self._device])
        self._on = {p.device for p in model.parameters() if p.device.type == "cuda"}  # several, where it is split
        for device in self._on:
            torch.cuda.reset_peak_memory_stats(device)

    def backward(self, batches: list[list[E]], place: str) -> float:
        """Compute the gradient of the sum of each batch's mean loss; return the sum. No gradients may exist before.

        With several ranks each computes its own rows' part. The parts are summed here; those that GaLore projects
        already, in its step.

        Raises:
            DivergedError: the loss is not finite; the text names ``place``.
            TrainingError: a single row does not fit into memory; the text names ``place``.
        """
        shares = [sorted(self._ranks.mine(rows), key=_length) for rows in batches]  # little padding, the same result
        most = max(len(rows) for rows in shares)
        parts = self._parts(shares)
        labels = [sum(int((part["labels"] != -100).sum()) for part in batch) for batch in parts]
        counted = [max(int(sum(number)), 1) for number in zip(*self._ranks.gather(labels), strict=True)]
        while True:
            done = attempt(lambda: self._backward(parts, counted))  # noqa: B023 - called at once
            loss, tokens = done or (0.0, 0)
            most = min(self.micro, most)
            told = self._ranks.gather([done is None, most, loss, *self._have()])
            if not any(short for short, *_ in told):
                break
            for (short, rows, *_), device in zip(told, self._ranks.devices, strict=True):
                if short and rows <= 1:
                    raise TrainingError(
                        f"out of memory in {place}: one row of up to {self._max_length} tokens does not fit on "
                        f"{device}; lower training.max_length or strategy.rank, set training.gradient_checkpointing, "
                        "or take a larger device"
                    )
            if done is None:
                self.micro = most // 2
                log.warning("out of memory in %s; from now on %d row(s) per forward pass", place, self.micro)
                parts = self._parts(shares)
            # A basis that GaLore computed in the failed attempt stays: it came from a complete gradient, and the
            # repeated attempt computes the same gradient.
            self._optimizer.zero_grad(set_to_none=True)
            release()
        total = sum(loss for _, _, loss, *_ in told)
        if not math.isfinite(total) and self._watch is None:
            raise DivergedError(f"loss is {total} in {place}; lower training.learning_rate")
        self.tokens += tokens
        if self._ranks.size > 1:
            self._share([any(have) for have in zip(*(have for _, _, _, *have in told), strict=True)])
        return total

    def totals(self, place: str) -> tuple[int, int, int, int]:
        """Tokens, the largest peak of memory (bytes), the fewest rows per forward pass, and what was not finite.

        Raises:
            TrainingError: the ranks' copies of the model are not the same any more; the text names ``place``.
        """
        squares = [torch.linalg.vector_norm(p.detach(), dtype=torch.float64) ** 2 for p in self._parameters]
        norm = sum(map(float, squares)) ** 0.5
        peak = max(map(torch.cuda.max_memory_allocated, self._on), default=0)
        found = 0 if self._watch is None else self._watch.found()
        told = self._ranks.gather([self.tokens, peak, self.micro, found, norm])
        tokens, peaks, micros, not_finite, norms = zip(*told, strict=True)
        if max(norms) - min(norms) > _SAME * max(norms):
            raise TrainingError(f"the copies of the model on {self._ranks.size} devices differ {place}")
        return int(sum(tokens)), int(max(peaks)), int(min(micros)), int(sum(not_finite))

    def _parts(self, batches: list[list[E]]) -> list[list[Batch]]:
        size = self.micro
        return [[self._collate(rows[i : i + size]) for i in range(0, len(rows), size)] for rows in batches]

    def _have(self) -> list[bool]:
        return [has_gradient(self._optimizer, parameter) for parameter in self._parameters]

    def _share(self, wanted: list[bool]) -> None:
        """Give a zero to parameters that only other ranks' rows have reached; sum the complete gradients."""
        for parameter, somewhere, here in zip(self._parameters, wanted, self._have(), strict=True):
            if somewhere and not here:
                parameter.grad = torch.zeros_like(parameter)
        if self._projected:
            return
        self._ranks.sum([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        if self._watch is not None:
            for parameter in self._parameters:
                self._watch.look(parameter)

    def _backward(self, batches: list[list[Batch]], counted: list[int]) -> tuple[float, int]:
        """One attempt: the loss, and the number of input tokens that went through the model; ends at a bad loss."""
        loss, tokens = 0.0, 0
        for parts, count in zip(batches, counted, strict=True):
            for number, part in enumerate(parts, start=1):
                if isinstance(self._optimizer, GaLore):
                    self._optimizer.last_backward = number == len(parts) and self._ranks.size == 1
                on_device = {key: value.to(self._device) for key, value in part.items()}
                with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                    summed, _ = self._loss_sum(self._model, on_device)
                so_far = loss + float(summed.detach()) / count
                if math.isfinite(so_far):
                    loss = so_far
                    self.scaler.scale(summed / count).backward()
                elif self._watch is not None:
                    self._watch.add(torch.ones(()))
                else:
                    return so_far, tokens
                whole = part.get("tokens", part.get("attention_mask"))  # packed rows, padded ones; images have none
                tokens += len(part["labels"]) if whole is None else int(whole.sum())
        return loss, tokens


def _length(example: object) -> int:
    """The number of a row's tokens; 0 for an image."""
    return len(getattr(example, "input_ids", ()))
