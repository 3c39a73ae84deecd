"""How far from the states that a site knows the next one may be.

Whoever runs the server may send anything. A site takes a state only when the training that the federation file tells
of can have led there: for every tensor from its bound on a round's update (``strategies.admission.bounds``), times the
rounds since a state that the site knows, which is the last one that it took, or the first, which it makes itself. A
state is combined of the sites' updates, so what none of them can do, it cannot.

What is not rigorous: with ``local_epochs`` the number of steps follows from the rows of the largest site, which is
``admission.max_rows`` or, where the file has none, taken for 10,000 times one's own; FlexLoRA's product can grow by a
factor in each round; plain SGD without ``max_grad_norm`` can go anywhere, and is held to 1,000 times the size of what
is known in a round.
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
from strategies.combine.weighted_mean import change_square

_ROWS = 10_000  # times its own rows that a site takes the largest one to have
_GROWTH = 1_000.0  # per round, where nothing limits a step
_ROUNDING = 1e-6  # of a number, per round: float32 at the server
_UNIT = 1.001  # the largest row of an A that is orthonormal, rounded


@dataclass(frozen=True)
class Reach:
    """How far the sites' training takes a state.

    Args:
        federation: what the server sent of its file.
        rows: of this site.
    """

    federation: FederationConfig
    rows: int

    def check(
        self, found: Mapping[str, Tensor | Factors], known: Mapping[str, Tensor], rounds: int, first: bool
    ) -> None:
        """Refuse what cannot have come of a known state.

        Args:
            found: tensors of a state, or changes of a known one in factors, by name; of the known one's shapes.
            known: a state, of which they are a part.
            rounds: between the two.
            first: whether the known state is the first one.

        Raises:
            WireError: names the tensor, what it is and what it could be.
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

    def check_like(self, found: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        """Refuse tensors that have other names, shapes or types than the known ones, or hold what is no number."""
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
        """What is measured of a tensor, and how much it is."""
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
        """How much that may be."""
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
        if math.isinf(step):
            return math.inf if is_second_moment(name) else rounds * _GROWTH * (1 + size(tensor, order))
        return rounds * (step + _ROUNDING * size(tensor, order))

    def _by_entry(self, name: str) -> bool:
        """Whether a tensor is measured by its entries."""
        return not name.endswith(BASE_WEIGHT) and by_entry(name, self.federation.training, self.federation.strategy)

    def _step(self, name: str, tensor: Tensor, *, by_entry: bool | None = None) -> float:
        """What a round moves a tensor by: every entry, or its norm."""
        federation, admission = self.federation, self.federation.admission
        training, strategy = federation.training, federation.strategy
        rows = admission.max_rows or _ROWS * self.rows
        noise = admission.max_noise
        if self._by_entry(name) if by_entry is None else by_entry:
            step = largest_entry(tensor, rows, training, strategy) + DEVIATIONS * noise
            return self._served(step, 1)
        step = largest_change(name, tensor, rows, training, strategy)
        if noise and not is_second_moment(name):
            step += 2 * longest_noise(tensor.numel(), noise)
        return self._served(step, tensor.numel())

    def _served(self, step: float, entries: int) -> float:
        """What the server's optimizer makes of a combined change of at most ``step``."""
        config = self.federation.server_optimizer
        if config is None:
            return step
        if isinstance(config, FedAvgMConfig):
            return config.learning_rate * step / (1 - config.momentum)
        ratio = config.beta1**2 / config.beta2 if config.beta2 else math.inf  # as of ADAM_STEP, without its correction
        adam = (1 - config.beta1) / math.sqrt((1 - config.beta2) * (1 - ratio)) if ratio < 1 else math.inf
        return config.learning_rate * min(step / config.tau, adam * math.sqrt(entries))

    def _added(self, name: str, known: Mapping[str, Tensor]) -> float:
        """What a round adds to a base weight: of products s B A of the factors beside it."""
        strategy = self.federation.strategy
        layer = name.removesuffix(BASE_WEIGHT)
        a, b = known[layer + LORA_A], known[layer + LORA_B]
        moved_a, moved_b = (self._step(layer + end, t, by_entry=False) for end, t in ((LORA_A, a), (LORA_B, b)))
        scale = self._scaling(len(a))
        if strategy.fresh_factors:  # A has entries up to 1 / sqrt(in), and B is zero; a larger rank's norms are longer
            return scale * moved_b * (math.sqrt(len(a)) + moved_a) * math.sqrt(strategy.rank / len(a))
        return 4 * scale * moved_a * moved_b  # sum_k p_k s (B_k - B) (A_k - A)

    def _product(self, name: str, known: Mapping[str, Tensor], rounds: int, first: bool) -> float:
        """Norm that B (out, r) has at most where A's rows are orthonormal and s B A is the sites' mean product, cut.

        A site makes (B + dB) (A + dA) of B A, whose norm is at most (|B| + |dB|) (1 + |dA|), with A as it was drawn
        (sqrt(R) + |dA|). The norm of dB with its scaling grows as the rank gets smaller, that of dA as it gets larger.
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
    """States that a site knows, by which the next one is judged: the first, and the last that it took.

    Args:
        first: the first state, as this site makes it.
    """

    def __init__(self, first: Tensors) -> None:
        self._first, self._last, self._after = first, first, 0

    def take(self, tensors: Tensors, after: int, reach: Reach) -> None:
        """Take note of a state.

        Args:
            tensors: all of it.
            after: the number of rounds that it is the result of.
            reach: how far it may be from what is known.

        Raises:
            WireError: it cannot have come of training.
        """
        reach.check_like(tensors, self._first)
        strategy = reach.federation.strategy
        known, since = (self._last, self._after) if after >= self._after else (self._first, 0)
        reach.check(tensors, known, after - since, since == 0)
        # Of a product that was cut to a smaller rank, the rest is not known.
        if after >= self._after and not (strategy.splits_anew and _rank(tensors) < strategy.rank):
            self._last, self._after = tensors, after


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """The LoRA rank of a state."""
    return max((len(tensor) for name, tensor in tensors.items() if name.endswith(LORA_A)), default=0)
