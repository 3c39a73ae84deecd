"""What an aggregation rule is: plain tensors in, plain tensors out; no Flower, no I/O.

A rule is told the round, the global state and the clients' updates, and returns the next global state. Everything a
rule knows between rounds is in that state, so a checkpoint of the state is a checkpoint of the federation, and a
rule may be built anew in every round. ``strategies.flower`` makes a Flower strategy of a rule.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from common.errors import AggregationError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One client's admitted reply to one round.

    Attributes:
        client: the client's name, for messages.
        num_examples: how many training examples stand behind it (at least 1).
        tensors: the trained tensors by name; exactly the round's active ones.
        lora_alpha: the client's own ``lora_alpha``, None when the rule has no LoRA or the client said nothing.
    """

    client: str
    num_examples: int
    tensors: Tensors
    lora_alpha: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of one round.

    Attributes:
        state: the whole next global state (tensors that were not active are carried over unchanged).
        diagnostics: scalars by name, e.g. ``{"client-cosine/model.layers.0": 0.31}``.
    """

    state: Tensors
    diagnostics: dict[str, float] = field(default_factory=dict)


class Rule(ABC):
    """How a strategy combines its clients' tensors. Stateless between rounds."""

    #: "weights": clients train base weights; "lora": clients train PEFT adapters.
    trains: ClassVar[Literal["weights", "lora"]]
    #: whether LoRA ranks and alphas may differ between clients.
    mixed_ranks: ClassVar[bool] = False
    #: the federation's LoRA alpha, when it has one.
    lora_alpha: float | None = None
    #: the largest LoRA rank a client may have where ranks are mixed; None: what its layers allow.
    max_rank: int | None = None

    def active(self, server_round: int, names: Iterable[str]) -> list[str]:
        """Names, of all in the state, that are trained and averaged in ``server_round`` (1, 2, ...). Default: all."""
        del server_round
        return list(names)

    def state_for(self, state: Mapping[str, Tensor], rank: int | None, lora_alpha: float | None) -> Tensors:
        """The state as a client of this LoRA rank and alpha must hold it. Default: the same for everybody."""
        del rank, lora_alpha
        return dict(state)

    @abstractmethod
    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> Outcome:
        """Combine the updates of a round, consuming each as it arrives.

        Args:
            server_round: Flower's round, starting with 1.
            state: the global state that the clients started from. Not modified.
            updates: admitted updates, in any order.

        Raises:
            AggregationError: there was no update, or the updates cannot be combined.
        """


class Averaging(Rule):
    """Rules that take the example-weighted mean of every active tensor: ``X <- sum_k p_k X_k``, p_k = n_k / sum n."""

    def __init__(self, lora_alpha: float | None = None) -> None:
        """Make the rule.

        Args:
            lora_alpha: what all clients must have; None: whatever they have, if it is the same.
        """
        self.lora_alpha = lora_alpha

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> Outcome:
        """See ``Rule.aggregate``."""
        active = self.active(server_round, state)
        mean, drift = WeightedMean(state), Drift(state)
        first: Update | None = None
        for update in updates:
            first = first or update
            if update.lora_alpha != first.lora_alpha:
                raise AggregationError(
                    f"lora-alpha is {first.lora_alpha} at {first.client} and {update.lora_alpha} at {update.client}; "
                    "factors can be averaged only when all clients have the same"
                )
            tensors = {name: update.tensors[name] for name in active}
            mean.fold(tensors, update.num_examples)
            drift.fold(tensors)
        return Outcome({**state, **mean.mean()}, drift.diagnostics())


class WeightedMean:
    """Running example-weighted mean of tensors, as a change relative to a base (arXiv 2410.23111, section 3).

    Sums ``n_k (W_k - W_0)`` in float32 and returns ``W_0 + sum / n`` in the base's dtype, so equal tensors average
    to themselves bit for bit, and memory does not depend on the number of clients.
    """

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self._base = base
        self._sums: Tensors = {}
        self._weight = 0

    def fold(self, tensors: Mapping[str, Tensor], num_examples: int) -> None:
        """Add one client's tensors (shapes as in the base)."""
        for name, tensor in tensors.items():
            change = tensor.to(torch.float32) - self._base[name].to(torch.float32)
            if name in self._sums:
                self._sums[name].add_(change, alpha=float(num_examples))
            else:
                self._sums[name] = change.mul_(float(num_examples))
        self._weight += num_examples

    def mean(self) -> Tensors:
        """The weighted mean of all that was folded.

        Raises:
            AggregationError: nothing was folded.
        """
        if self._weight == 0:
            raise AggregationError("no update to average: every client failed or was refused")
        return {
            name: (self._base[name].to(torch.float32) + total / self._weight).to(self._base[name].dtype)
            for name, total in self._sums.items()
        }


class Drift:
    """How far and in how different directions the clients moved, per layer group, without keeping their updates.

    The mean pairwise cosine of unit vectors u_k is ``(|sum u_k|^2 - K) / (K (K - 1))``, so one running sum is enough.
    """

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self._base = base
        self._units: dict[str, Tensors] = {}
        self._norms: dict[str, list[float]] = {}

    def fold(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one client's tensors."""
        groups: dict[str, Tensors] = {}
        for name, tensor in tensors.items():
            change = tensor.to(torch.float32) - self._base[name].to(torch.float32)
            groups.setdefault(layer_group(name), {})[name] = change
        for group, changes in groups.items():
            norm = math.sqrt(sum(float(c.square().sum(dtype=torch.float64)) for c in changes.values()))
            self._norms.setdefault(group, []).append(norm)
            units = self._units.setdefault(group, {})
            for name, change in changes.items():
                unit = change / norm if norm > 0 else change
                units[name] = units[name].add_(unit) if name in units else unit

    def diagnostics(self) -> dict[str, float]:
        """``client-norm/<group>``: mean L2 norm; ``client-cosine/<group>`` when at least two clients moved."""
        result = {}
        for group, norms in self._norms.items():
            result[f"client-norm/{group}"] = sum(norms) / len(norms)
            k = sum(n > 0 for n in norms)
            if k > 1:
                square = sum(float(u.square().sum(dtype=torch.float64)) for u in self._units[group].values())
                result[f"client-cosine/{group}"] = (square - k) / (k * (k - 1))
        return result


def layer_group(name: str) -> str:
    """The transformer block a tensor belongs to, ``"...layers.7"``; its parent module when it is in no block."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0] or name
