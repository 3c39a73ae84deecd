"""How far an update moves, and how far it can: what admission holds against an update that is well formed but huge.

Two bounds. An absolute one for every tensor, which no client that trains as the federation file says can exceed; and
one from the cohort, for the whole update, which needs all updates of a round.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.config.strategy import StrategyConfig
from common.config.training import TrainingConfig
from common.errors import RefusedUpdate
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
#: The same where the second moment may begin from any: the first step's.
_ANY_STEP = 1 / math.sqrt(1 - _BETA2)
_TOLERANCE = 2.0  # rounding: of 8-bit moments, of bfloat16 weights and factors
_WIRE = 1.05  # rounding of noise on the wire
_COHORT = 3  # a median of fewer norms says nothing about one of them


def change_norms(update: Update, base: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 norm of an update's change of every tensor.

    Args:
        update: an admitted update.
        base: what the client started from, by name; shapes as in the update.
    """
    changes: dict[str, Tensor | Factors] = {**update.tensors, **update.factors}
    return {name: math.sqrt(change_square(value, base[name])) for name, value in changes.items()}


def largest_change(name: str, base: Tensor, rows: int, training: TrainingConfig, strategy: StrategyConfig) -> float:
    """What a round's training can move a tensor by at most, as an L2 norm; infinite when nothing limits it.

    Args:
        name: of the tensor.
        base: the tensor at the start of the round; under FedFTG a matrix, of a head, or a second moment.
        rows: of the client's shard.
        training: the federation's training section.
        strategy: its strategy section.
    """
    if is_second_moment(name):  # before and after, the sum of its entries is at most this
        limit = math.inf if training.max_grad_norm is None else training.max_grad_norm**2 / strategy.rank
        return _TOLERANCE * (limit + float(base.sum()))
    entries, scale = base.numel(), 1.0
    if strategy.trains == "weights" and not in_head(name):
        # The step has the norm of its projection, whose shape is (rank, larger side).
        entries, scale = min(strategy.rank, *base.shape) * max(base.shape), strategy.scale
    if training.optimizer == "adamw":
        largest = _ANY_STEP if strategy.optimizer_state == "averaged" else ADAM_STEP
        step = scale * largest * math.sqrt(entries)
    else:
        step = math.inf if training.max_grad_norm is None else scale * training.max_grad_norm
    shrinking = training.weight_decay * float(base.float().norm()) if training.weight_decay else 0.0
    return _TOLERANCE * training.steps(rows) * training.learning_rate * (step + shrinking)


def check_possible(
    update: Update,
    norms: Mapping[str, float],
    base: Mapping[str, Tensor],
    training: TrainingConfig,
    strategy: StrategyConfig,
    privacy: Declared | None = None,
) -> None:
    """Refuse an update that the federation's training, and the noise that the site declared, cannot have made.

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
        if not math.isfinite(norm):  # although nothing limits it
            raise RefusedUpdate(f"{update.client}: {name} moved by {norm}; allowed: a finite number")


def noise_in(base: Mapping[str, Tensor], strategy: StrategyConfig, privacy: Declared | None) -> float:
    """L2 norm that the noise on an update stays below but for one time in 10^12; 0 for a site that adds none.

    Args:
        base: the tensors that are noised, by name.
        strategy: where all sites share a basis, noise is added beside it, to (rank, larger side) numbers.
        privacy: what the site declared.
    """
    if privacy is None:
        return 0.0
    numbers = (
        strategy.rank * max(tensor.shape) if strategy.shares_basis and not in_head(name) else tensor.numel()
        for name, tensor in base.items()
    )
    return _WIRE * longest_noise(sum(numbers), privacy.noise)


def longest_noise(entries: int, std: float) -> float:
    """L2 norm that ``entries`` independent Gaussians of this standard deviation exceed with probability below 1e-12.

    Source: Laurent and Massart (2000), lemma 1: a chi-square variable with d degrees of freedom exceeds
    d + 2 sqrt(d t) + 2 t <= (sqrt(d) + sqrt(2 t))^2 with probability at most exp(-t).
    """
    return std * (math.sqrt(entries) + math.sqrt(2 * math.log(1e12)))


@dataclass(frozen=True)
class Moved:
    """How far a client's whole update moves.

    Attributes:
        norm: its L2 norm.
        signal: what of that training can have done: of a noised update at most what it was clipped to, and the decay.
        noise: the rest, see ``noise_in``.
    """

    norm: float
    signal: float
    noise: float


def moved(
    norms: Mapping[str, float],
    rows: int,
    base: Mapping[str, Tensor],
    training: TrainingConfig,
    strategy: StrategyConfig,
    privacy: Declared | None = None,
) -> Moved:
    """How far an update of a client with so many rows moves the weights; ``norms`` are those of its tensors."""
    norms = {name: norms[name] for name in without(norms)}
    norm = total(norms)
    if privacy is None:
        return Moved(norm, norm, 0.0)
    decay = 0.0
    if training.weight_decay and strategy.trains == "weights":  # it follows from the file, and is not clipped
        start = total({name: float(base[name].float().norm()) for name in norms})
        decay = training.steps(rows) * training.learning_rate * training.weight_decay * start
    return Moved(
        norm, min(norm, privacy.clip + decay), noise_in({name: base[name] for name in norms}, strategy, privacy)
    )


def cohort_bound(norms: Mapping[str, float], ratio: float) -> float:
    """``ratio`` times the median norm of a round's updates; infinite for fewer than three of them.

    Args:
        norms: of the whole update, by client; of a noised one its ``signal``.
        ratio: how many times as far as the median client one may move.
    """
    # The upper of two middle norms: half a cohort that stands still must not shut out the half that trains, and fewer
    # than half of a round's updates are ever above it.
    median = statistics.median_high(norms.values()) if len(norms) >= _COHORT else 0.0
    return ratio * median if median > 0 else math.inf


def total(norms: Mapping[str, float]) -> float:
    """L2 norm of the whole update from those of its tensors."""
    return math.sqrt(sum(norm**2 for norm in norms.values()))
