"""Bounds on the distance between a received state and a state that the site knows.

A malicious server may send anything. A site accepts a state only when the training in the federation file could have
produced it: each tensor may differ from a known state by the bound on one round's update
(``strategies.admission.bounds``) times the number of rounds in between. The known state is the last one that the site
accepted, or the first, which the site computes itself. A state is an aggregate of the sites' updates, so it cannot move
further than an update can. With ``downlink_rank`` a part of the change waits at the server, so a round may publish what
all rounds before it have left.

The bounds are not rigorous in three cases. With ``local_epochs`` the number of steps depends on the rows of the largest
site; without ``admission.max_rows`` the site assumes 10,000 times its own rows. FlexLoRA's product can grow by a factor
in each round. Plain SGD without ``max_grad_norm`` has no bound, so the site allows 1,000 times the known tensor's size
per round.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.aggregation import FedAvgMConfig
from common.config.federation import FederationConfig
from common.errors import WireError
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B, scaling
from common.model.second_moments import is_second_moment
from common.protocol.factors import Factors
from common.protocol.tensors import Tensors
from strategies.admission.bounds import DEVIATIONS, by_entry, largest_change, largest_entry, longest_noise, size
from strategies.admission.well_formed import LARGEST
from strategies.combine.masked import MOST_NOISE
from strategies.combine.weighted_mean import change_square

_ROWS = 10_000  # assumed rows of the largest site, as a multiple of this site's rows
_GROWTH = 1_000.0  # allowed growth per round where no bound exists
_ROUNDING = 1e-6  # relative rounding error per round: the server computes in float32
_DRAWN = 1e-6  # relative: processors draw an A or a new head with other last bits, up to 2e-7 was measured
_UNIT = 1.001  # largest norm of a row of an orthonormal A, with rounding


@dataclass(frozen=True)
class Reach:
    """Computes how far the sites' training can move a state.

    Args:
        federation: the federation's settings, as the server sent them.
        rows: number of training rows at this site.
    """

    federation: FederationConfig
    rows: int

    def check(
        self, found: Mapping[str, Tensor | Factors], known: Mapping[str, Tensor], rounds: int, first: bool
    ) -> None:
        """Reject a state that training cannot have made from a known one.

        Args:
            found: tensors of the received state, or changes of the known state in factors, by name; shapes as known.
            known: the known state; may hold more tensors.
            rounds: number of rounds between the two states.
            first: whether the known state is the first one.

        Raises:
            WireError: a tensor is too far away; the text names the tensor, its size and the bound.
        """
        for name, value in found.items():
            what, amount = self._amount(name, value, known[name])
            most = self._most(name, known, rounds, first)
            if math.isinf(most):
                most = LARGEST
            if not amount <= most:
                raise WireError(
                    f"{name}: {what} {amount:.4g}; allowed: up to {most:.4g}, all that {rounds} round(s) of the "
                    f"federation's training can do"
                )

    def rounds(self, since: int, after: int) -> int:
        """Number of rounds whose training may lie between the states after two rounds.

        With ``downlink_rank`` T' - T = (S' - S) + E - E', and E is at most the change of all rounds so far.
        """
        return 2 * after if self.federation.strategy.publishes_later else after - since

    def check_like(self, found: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        """Reject tensors with names, shapes or dtypes that the known state does not have, or with non-finite values."""
        if more := found.keys() - known.keys():
            raise WireError(f"{min(more)}: this site knows no such tensor")
        for name, tensor in found.items():
            like = known[name]
            if (tensor.dtype, tensor.shape) != (like.dtype, like.shape):
                came, due = (f"{one.dtype} of shape {tuple(one.shape)}" for one in (tensor, like))
                raise WireError(f"{name}: {came} received, {due} expected")
            if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
                raise WireError(f"{name}: {bad} numbers are not finite; allowed: none")
            if is_second_moment(name) and bool((tensor < 0).any()):
                raise WireError(f"{name}: negative entries; allowed: 0 and more")

    def _amount(self, name: str, value: Tensor | Factors, known: Tensor) -> tuple[str, float]:
        """The measure of a tensor's change that has a bound: its name in words, and its value."""
        strategy = self.federation.strategy
        if isinstance(value, Tensor) and name.endswith((LORA_A, LORA_B)):
            if strategy.fresh_factors:
                return "its largest entry is", size(value, math.inf)
            if strategy.splits_anew and name.endswith(LORA_A):
                return "its longest row has norm", max(float(row.norm()) for row in value.float())
            if strategy.splits_anew:
                return "its norm is", size(value, 2)
        if isinstance(value, Tensor) and self._by_entry(name):
            return "an entry moved by", size(value.float() - known.float(), math.inf)
        return "it moved by a norm of", math.sqrt(change_square(value, known))

    def _most(self, name: str, known: Mapping[str, Tensor], rounds: int, first: bool) -> float:
        """The bound on the measure that ``_amount`` gives."""
        strategy, tensor = self.federation.strategy, known[name]
        if strategy.fresh_factors and name.endswith(LORA_A):
            return 1 / math.sqrt(tensor.shape[1])
        if strategy.fresh_factors and name.endswith(LORA_B):
            return 0.0
        if strategy.splits_anew and name.endswith(LORA_A):
            return _UNIT
        if strategy.splits_anew and name.endswith(LORA_B):
            return self._product(name, known, rounds, first)
        if name.endswith(BASE_WEIGHT) and strategy.trains == "lora":
            step = self._added(name, known)
        else:
            step = self._step(name, tensor)
        order = math.inf if self._by_entry(name) else 2
        drawn = max(_DRAWN, torch.finfo(tensor.dtype).eps) * size(tensor, order) if first else 0.0
        if math.isinf(step):
            return math.inf if is_second_moment(name) else rounds * _GROWTH * (1 + size(tensor, order)) + drawn
        return rounds * (step + _ROUNDING * size(tensor, order)) + drawn

    def _by_entry(self, name: str) -> bool:
        """Whether a tensor's bound is on its entries; else on its norm."""
        return not name.endswith(BASE_WEIGHT) and by_entry(name, self.federation.training, self.federation.strategy)

    def _step(self, name: str, tensor: Tensor, *, by_entry: bool | None = None) -> float:
        """Bound on the change of a tensor in one round: on each entry, or on the norm."""
        federation, admission = self.federation, self.federation.admission
        training, strategy = federation.training, federation.strategy
        rows = admission.max_rows or _ROWS * self.rows
        noise = admission.max_noise + MOST_NOISE * federation.shared_noise
        if self._by_entry(name) if by_entry is None else by_entry:
            step = largest_entry(name, tensor, rows, training, strategy) + DEVIATIONS * noise
            return self._served(step, 1)
        step = largest_change(name, tensor, rows, training, strategy)
        if noise and not is_second_moment(name):
            step += 2 * longest_noise(tensor.numel(), noise)
        return self._served(step, tensor.numel())

    def _served(self, step: float, entries: int) -> float:
        """Bound on the change after the server optimizer, for an averaged change of at most ``step``."""
        config = self.federation.server_optimizer
        if config is None:
            return step
        if isinstance(config, FedAvgMConfig):
            return config.learning_rate * step / (1 - config.momentum)
        ratio = (
            config.beta1**2 / config.beta2 if config.beta2 else math.inf
        )  # like ADAM_STEP, but without bias correction
        adam = (1 - config.beta1) / math.sqrt((1 - config.beta2) * (1 - ratio)) if ratio < 1 else math.inf
        return config.learning_rate * min(step / config.tau, adam * math.sqrt(entries))

    def _added(self, name: str, known: Mapping[str, Tensor]) -> float:
        """Bound on the change of a base weight in one round, from the products s B A of the factors beside it."""
        strategy = self.federation.strategy
        layer = name.removesuffix(BASE_WEIGHT)
        a, b = known[layer + LORA_A], known[layer + LORA_B]
        moved_a, moved_b = (self._step(layer + end, t, by_entry=False) for end, t in ((LORA_A, a), (LORA_B, b)))
        scale = self._scaling(len(a))
        if strategy.fresh_factors:  # A has entries up to 1 / sqrt(in), B is zero; norms grow with the rank
            return scale * moved_b * (math.sqrt(len(a)) + moved_a) * math.sqrt(strategy.rank / len(a))
        return 4 * scale * moved_a * moved_b  # sum_k p_k s (B_k - B) (A_k - A)

    def _product(self, name: str, known: Mapping[str, Tensor], rounds: int, first: bool) -> float:
        """Bound on the norm of B (out, r), where A's rows are orthonormal and s B A is the truncated mean product.

        A site's product (B + dB) (A + dA) has a norm of at most (|B| + |dB|) (1 + |dA|); in the first round, with A as
        drawn, the last factor is (sqrt(R) + |dA|). The scaled norm of dB grows as the rank gets smaller, the norm of dA
        as the rank gets larger.
        """
        b, a = known[name], known[name.removesuffix(LORA_B) + LORA_A]
        whole, rank, scale = self.federation.strategy.rank, len(a), self._scaling(len(a))
        moved_b = scale * math.sqrt(rank) * self._step(name, b, by_entry=False)
        moved_a = math.sqrt(whole / rank) * self._step(name.removesuffix(LORA_B) + LORA_A, a, by_entry=False)
        product = scale * size(b, 2)
        for number in range(rounds):
            product = (product + moved_b) * ((math.sqrt(whole) if first and number == 0 else 1.0) + moved_a)
        return product * (1 + _ROUNDING) / scale

    def _scaling(self, rank: int) -> float:
        strategy = self.federation.strategy
        assert strategy.trains == "lora"  # noqa: S101 - nothing else has factors A and B
        return scaling(strategy.lora_alpha, rank, rslora=strategy.rslora)


class Known:
    """The states that a site knows, and compares the next one with: the first, and the last accepted one.

    Args:
        first: the first state, as this site computes it.
    """

    def __init__(self, first: Tensors) -> None:
        self._first, self._last, self._after = first, first, 0

    @property
    def last(self) -> Tensors | None:
        """The last accepted state; None: there was none."""
        return None if self._last is self._first else self._last

    def take(self, tensors: Tensors, after: int, reach: Reach) -> None:
        """Check a state, and remember it as the last accepted one.

        Args:
            tensors: all tensors of the state.
            after: number of rounds after which this is the state.
            reach: computes the bounds.

        Raises:
            WireError: training cannot have made the state.
        """
        reach.check_like(tensors, self._first)
        strategy = reach.federation.strategy
        known, since = (self._last, self._after) if after > self._after else (self._first, 0)
        reach.check(tensors, known, after - since, since == 0)
        # A state that was cut to a smaller rank is not remembered: the part that was cut off is unknown.
        if after >= self._after and not (strategy.splits_anew and _rank(tensors) < strategy.rank):
            self._last, self._after = tensors, after


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """The LoRA rank of a state."""
    return max((len(tensor) for name, tensor in tensors.items() if name.endswith(LORA_A)), default=0)
