"""L2 bounds on a client's update. Admission rejects a well-formed update that is larger than local training could make.

There are two bounds. The absolute bound, one per tensor, cannot be exceeded by a client that trains as the federation
file says. The cohort bound limits the whole update by the norms of the round's other updates (decision 010).
"""

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from common.config.strategy import StrategyConfig
from common.config.training import TrainingConfig
from common.errors import RefusedUpdate
from common.linalg.remembered import square_norm
from common.model.families import in_head
from common.model.second_moments import is_second_moment, without
from common.protocol.factors import Factors
from common.protocol.messages import Declared
from strategies.combine.weighted_mean import change_square
from strategies.rule import Update

_BETA1, _BETA2 = TrainingConfig.betas
#: Largest |m / sqrt(v)| of any sequence of gradients: by Cauchy-Schwarz (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)).
#: The correction of the bias, sqrt(1 - b2^t) / (1 - b1^t), is never above 1.
ADAM_STEP = (1 - _BETA1) / math.sqrt((1 - _BETA2) * (1 - _BETA1**2 / _BETA2))
#: The largest |m / sqrt(v)| when v may start at any value: it is reached in the first step.
_ANY_STEP = 1 / math.sqrt(1 - _BETA2)
_LONG = 10_000  # steps; every later step counts as ``ADAM_STEP``
_TOLERANCE = 2.0  # room for rounding: 8-bit moments, bfloat16 weights and factors
DEVIATIONS = 10.0  # standard deviations that the noise on one number never reaches
_WIRE = 1.05  # room for rounding the noise on the wire
_COHORT = 3  # the median of one or two norms tells nothing about either


def change_norms(update: Update, base: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 norm of each tensor's change in an update.

    Args:
        update: an admitted update.
        base: the tensors that the client started from, by name; shapes as in the update.
    """
    changes: dict[str, Tensor | Factors] = {**update.tensors, **update.factors}
    return {name: math.sqrt(change_square(value, base[name])) for name, value in changes.items()}


def largest_change(name: str, base: Tensor, rows: int, training: TrainingConfig, strategy: StrategyConfig) -> float:
    """Largest L2 norm of the change that one round's training can make to a tensor; infinite when nothing limits it.

    Args:
        name: the tensor's name.
        base: the tensor at the start of the round; under FedFTG a weight (out, in), a tensor of the head, or a second
            moment (longer side,).
        rows: number of rows in the client's shard.
        training: the federation's training section.
        strategy: the federation's strategy section.
    """
    if is_second_moment(name):  # the sum of a second moment's entries never exceeds this limit plus the sum before
        limit = math.inf if training.max_grad_norm is None else training.max_grad_norm**2 / strategy.rank
        return _TOLERANCE * (limit + float(base.sum()))
    entries, scale, steps = base.numel(), 1.0, training.steps(rows)
    if strategy.trains == "weights" and strategy.projects(name):
        # A GaLore step has the norm of its projection (rank, larger side): the basis is orthonormal.
        entries, scale = min(strategy.rank, *base.shape) * max(base.shape), strategy.scale
    if training.optimizer == "adamw":
        path = scale * adam_path(steps, strategy) * math.sqrt(entries)
    else:
        path = math.inf if training.max_grad_norm is None else steps * scale * training.max_grad_norm
    return _TOLERANCE * training.rate(name) * (path + steps * _shrinking(base, 2, training))


def largest_entry(name: str, base: Tensor, rows: int, training: TrainingConfig, strategy: StrategyConfig) -> float:
    """Largest change that one round's training can make to an entry of a tensor that is bounded ``by_entry``.

    Aggregation entry by entry cannot exceed this bound, so the bound holds for the next state, too.
    """
    steps = training.steps(rows)
    path = adam_path(steps, strategy) + steps * _shrinking(base, math.inf, training)
    return _TOLERANCE * training.rate(name) * path


def largest_projected(rows: int, training: TrainingConfig, strategy: StrategyConfig) -> float:
    """Largest change that one round's training can make to an entry of the projected change R of a weight.

    Weight decay is not part of R. Without a gradient's largest norm, plain SGD has no bound.
    """
    steps = training.steps(rows)
    if training.optimizer == "adamw":
        path = adam_path(steps, strategy)
    else:
        path = math.inf if training.max_grad_norm is None else steps * training.max_grad_norm
    return _TOLERANCE * training.learning_rate * strategy.scale * path if strategy.trains == "weights" else math.inf


def by_entry(name: str, training: TrainingConfig, strategy: StrategyConfig) -> bool:
    """Whether each entry of a tensor has its own bound: Adam trains the tensor directly, not in a projection."""
    return not strategy.projects(name) and training.optimizer == "adamw" and not is_second_moment(name)


def adam_path(steps: int, strategy: StrategyConfig) -> float:
    """Largest change of an entry in ``steps`` steps of Adam, for learning rate 1 and without weight decay."""
    if strategy.optimizer_state == "averaged":
        return steps * _ANY_STEP
    if strategy.optimizer_state == "keep" or (strategy.trains == "weights" and strategy.moments == "8bit"):
        return steps * ADAM_STEP  # moments are kept between rounds, or are rounded
    return _path_from_zero(min(steps, _LONG)) + max(0, steps - _LONG) * ADAM_STEP


@cache
def _path_from_zero(steps: int) -> float:
    """Largest change of an entry from zero moments: step t has the bound ``ADAM_STEP`` with sums over t terms."""
    ratio = _BETA1**2 / _BETA2
    first = (1 - _BETA1) / math.sqrt(1 - ratio) / math.sqrt(1 - _BETA2)
    return sum(first * math.sqrt((1 - ratio**t) * (1 - _BETA2**t)) / (1 - _BETA1**t) for t in range(1, steps + 1))


def _shrinking(base: Tensor, order: float, training: TrainingConfig) -> float:
    """Norm of the given order of the change by one step of weight decay, for learning rate 1."""
    if not training.weight_decay:
        return 0.0
    return training.weight_decay * (math.sqrt(square_norm(base)) if order == 2 else size(base, order))


def size(tensor: Tensor, order: float) -> float:
    """A tensor's vector norm of the given order, in float32."""
    return float(torch.linalg.vector_norm(tensor.float(), order)) if tensor.numel() else 0.0


def check_possible(
    update: Update,
    norms: Mapping[str, float],
    base: Mapping[str, Tensor],
    training: TrainingConfig,
    strategy: StrategyConfig,
    privacy: Declared | None = None,
) -> None:
    """Reject an update that the federation's training and the noise that the site declared cannot explain.

    Raises:
        RefusedUpdate: names client, tensor, norm and bound.
    """
    for name, norm in norms.items():
        if is_second_moment(name) and bool((update.tensors[name] < 0).any()):
            raise RefusedUpdate(f"{update.client}: {name} has negative entries; allowed: 0 and more")
        bound = largest_change(name, base[name], update.num_examples, training, strategy)
        noise = noise_in({name: base[name]}, strategy, privacy)
        if not norm <= bound + noise:
            what = "a round's steps" if privacy is None else f"a round's steps and the declared noise ({noise:.3g})"
            raise RefusedUpdate(
                f"{update.client}: {name} moved by {norm:.3g}; allowed: {bound + noise:.3g}, all that {what} can do"
            )
        if not math.isfinite(norm):  # the bound itself may be infinite
            raise RefusedUpdate(f"{update.client}: {name} moved by {norm}; allowed: a finite number")
        if name in update.tensors and by_entry(name, training, strategy):
            entry = largest_entry(name, base[name], update.num_examples, training, strategy)
            entry += 0.0 if privacy is None else DEVIATIONS * privacy.noise
            furthest = size(update.tensors[name].float() - base[name].float(), math.inf)
            if not furthest <= entry:  # within the norm, but all in a few places
                raise RefusedUpdate(
                    f"{update.client}: an entry of {name} moved by {furthest:.3g}; allowed: {entry:.3g}"
                )


def noise_in(base: Mapping[str, Tensor], strategy: StrategyConfig, privacy: Declared | None) -> float:
    """L2 norm that the noise on an update exceeds with probability below 1e-12; 0 for a site that adds no noise.

    Args:
        base: the tensors that get noise, by name.
        strategy: where all sites share a basis, a site adds noise to the projected change (rank, larger side) only.
        privacy: the noise that the site declared.
    """
    if privacy is None:
        return 0.0
    return _WIRE * longest_noise(noised_numbers(base, strategy), privacy.noise)


def noised_numbers(base: Mapping[str, Tensor], strategy: StrategyConfig) -> int:
    """How many numbers of an update of these tensors get noise of their own; see ``noise_in``."""
    return sum(
        strategy.rank * max(tensor.shape) if strategy.shares_basis and not in_head(name) else tensor.numel()
        for name, tensor in base.items()
    )


def longest_noise(entries: int, std: float) -> float:
    """L2 norm that ``entries`` independent Gaussians of this standard deviation exceed with probability below 1e-12.

    Source: Laurent and Massart (2000), lemma 1: a chi-square variable with d degrees of freedom exceeds
    d + 2 sqrt(d t) + 2 t <= (sqrt(d) + sqrt(2 t))^2 with probability at most exp(-t).
    """
    return std * (math.sqrt(entries) + math.sqrt(2 * math.log(1e12)))


@dataclass(frozen=True)
class UpdateSize:
    """L2 norm of a client's whole update, and the parts of the norm that training and noise can explain.

    Attributes:
        norm: L2 norm of the update.
        signal: the part that training can explain. For an update with DP noise: at most the clipping norm plus weight
            decay.
        noise: the part that noise can explain, see ``noise_in``.
    """

    norm: float
    signal: float
    noise: float


def update_size(
    norms: Mapping[str, float],
    rows: int,
    base: Mapping[str, Tensor],
    training: TrainingConfig,
    strategy: StrategyConfig,
    privacy: Declared | None = None,
) -> UpdateSize:
    """Size of a client's update, second moments left out.

    Args:
        norms: L2 norm of each tensor's change, by name.
        rows: number of rows in the client's shard.
        base: the tensors that the client started from, by name.
        training: the federation's training section.
        strategy: the federation's strategy section.
        privacy: the noise that the site declared; None: the site adds none.
    """
    norms = {name: norms[name] for name in without(norms)}
    norm = total(norms)
    if privacy is None:
        return UpdateSize(norm, norm, 0.0)
    decay = 0.0
    if training.weight_decay and strategy.trains == "weights":  # sites clip the update without its decay
        start = math.sqrt(sum(square_norm(base[name]) for name in norms))
        decay = training.steps(rows) * training.learning_rate * training.weight_decay * start
    return UpdateSize(
        norm, min(norm, privacy.clip + decay), noise_in({name: base[name] for name in norms}, strategy, privacy)
    )


def cohort_bound(norms: Mapping[str, float], ratio: float) -> float:
    """``ratio`` times the median norm of a round's updates; infinite for fewer than three of them.

    Args:
        norms: L2 norm of the whole update, by client; for an update with DP noise: its ``signal``.
        ratio: how many times the median norm a client's update may have.
    """
    # The upper of two middle norms: if half the clients do not train, those who do must not be rejected. Fewer than
    # half of a round's updates are ever above the upper median.
    median = statistics.median_high(norms.values()) if len(norms) >= _COHORT else 0.0
    return ratio * median if median > 0 else math.inf


def heaviest(rows: Collection[int], ratio: float) -> float:
    """The largest weight of a client in the mean: ``ratio`` times the median number of rows in the cohort.

    A client that declares more rows gets this weight: among K clients, if half of the others are at the median or
    above, its share of the mean is at most ``ratio`` / (``ratio`` + (K - 1) / 2). Infinite for one client.

    Args:
        rows: numbers of rows that the clients of the cohort declared.
        ratio: largest weight as a multiple of the median, from 1.
    """
    # The lower of two middle numbers: with two clients, the one that declares more is limited by the other.
    return math.floor(ratio * statistics.median_low(rows)) if len(rows) > 1 else math.inf


def total(norms: Mapping[str, float]) -> float:
    """L2 norm of a whole update from the norms of the update's tensors."""
    return math.sqrt(sum(norm**2 for norm in norms.values()))
