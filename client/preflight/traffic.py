"""Checks of a round's costs: bytes down and up, minutes."""

from torch import Tensor

from client.preflight.context import CheckContext
from client.preflight.finding import Finding, Skip
from client.preflight.steps import measured
from common.config.aggregation import MedianConfig, TrimmedMeanConfig
from common.config.federation import FederationConfig
from common.config.galore import GaLoreConfig
from common.model import second_moments
from common.protocol.factors import Factors, num_bytes, pack
from common.text import size
from strategies.flower.named import make_rule

_STEPS = 3  # most steps that are measured


def bytes_per_round(federation: FederationConfig, tensors: dict[str, Tensor], steps: int) -> tuple[int, int]:
    """Bytes of tensors down and up in a round after the first.

    The bytes down are those for a site that took part in the last round, with ``cohort.min_clients`` sites in it.

    Args:
        federation: the federation's settings.
        tensors: the trained tensors by name, in this site's shapes.
        steps: optimizer steps per round.
    """
    strategy = federation.strategy
    if strategy.trains == "weights":
        if strategy.optimizer_state == "averaged":
            tensors = tensors | second_moments.first(tensors)
        alone = strategy.rank * strategy.bases(steps)
        up = sum(_packed(n, t, alone, strategy) for n, t in tensors.items())
        most = alone if strategy.downlink_rank == "auto" else strategy.downlink_rank
        if most is None and isinstance(federation.aggregation, MedianConfig | TrimmedMeanConfig):
            return sum(4 * tensor.numel() for tensor in tensors.values()), up
        together = alone * (1 if strategy.shares_basis else federation.cohort.min_clients)
        down = together if most is None else min(together, most)
        return sum(_packed(n, t, down, strategy) for n, t in tensors.items()), up
    rule = make_rule(strategy, seed=federation.training.seed)
    rounds = [num_bytes(tensors[name] for name in rule.active(number, tensors)) for number in (1, 2)]
    mean = sum(rounds) // 2  # a round's trained tensors are sent up in that round, and down in the next
    return mean, mean


def _packed(name: str, weight: Tensor, rank: int, strategy: GaLoreConfig) -> int:
    """Bytes of one weight's change in so many directions."""
    if second_moments.is_second_moment(name) or not strategy.projects(name):
        return 4 * weight.numel()
    rows, columns = weight.shape
    left, other = weight.new_zeros(rows, rank).float(), weight.new_zeros(rank, columns).float()
    change = Factors(1.0, [(left, other)], common=strategy.shares_basis)
    return num_bytes(pack(name, change, weight.detach(), strategy.exchange(0, 1)).values())


def traffic(subject: CheckContext) -> Finding:
    """Bytes per round, and the time that they take on this link."""
    settings = subject.settings
    down, up = bytes_per_round(settings, dict(subject.tuned.parameters), subject.steps)
    found = f"{size(down)} down and {size(up)} up a round"
    strategy = settings.strategy
    if strategy.trains == "weights" and not strategy.shares_basis and not strategy.publishes_later:
        found += f" (down: with {settings.cohort.min_clients} sites)"
    rate, source = _rate(subject)
    if rate is None:
        return Finding("ok", f"{found}; needs --superlink or --mbit for minutes")
    seconds = (down + up) / rate
    found += f"; {_duration(seconds)} at {rate * 8 / 1e6:.1f} Mbit/s ({source})"
    if seconds > settings.cohort.round_deadline:
        mend = "a faster line, or ask the operator for `wire_precision`, a lower `rank` or a longer `round_deadline`"
        return Finding("FAIL", f"{found}; a round may take {settings.cohort.round_deadline:g} s", mend)
    return Finding("ok", found)


def training(subject: CheckContext) -> Finding:
    """Duration of a round's training on this machine, from a few measured steps; and their peak memory."""
    settings = subject.settings
    if not subject.measure or subject.federation_file is None:
        raise Skip("needs --measure")
    answer = measured(subject.site_file, subject.federation_file, min(_STEPS, subject.steps), subject.deadline)
    seconds = answer["seconds"] * subject.steps
    peak = answer["device"] or answer["host"]
    found = (
        f"{subject.steps} steps of {answer['seconds']:.2f} s are {_duration(seconds)} a round; {size(peak)} at the peak"
    )
    if seconds > settings.cohort.round_deadline:
        mend = "a faster device, or ask the operator for fewer `training.local_steps` or a longer `round_deadline`"
        return Finding("FAIL", f"{found}; a round may take {settings.cohort.round_deadline:g} s", mend)
    return Finding("ok", found)


def _rate(subject: CheckContext) -> tuple[float | None, str]:
    """Bytes per second, and the source of the number."""
    if subject.mbit is not None:
        return subject.mbit * 1e6 / 8, "as told"
    if subject.superlink is None:
        return None, ""
    return subject.upload[0], "as measured up; --mbit tells otherwise"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
