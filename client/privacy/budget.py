"""What a site has spent, by its ledger, whether its limits allow more, and how finely scores leave.

What is spent is counted when it is charged, before a row is touched: what a crash or an error has made of a round, or
of an evaluation, does not give it back.
"""

import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime

from client.privacy.ledger import Entry
from client.privacy.noise import cost, epsilon
from common.config.federation import FederationConfig
from common.config.site import PolicyConfig, PrivacyConfig, SiteConfig
from common.errors import PolicyError
from common.metrics import ANSWERS, SCORES

CEILING = 20.0  # nats
_LOSS, _PERPLEXITY = "loss", "perplexity"
_AGAIN = 3  # rounds and evaluations for every one of an agreement: work that a crash has taken is asked for again


class Totals:
    """What the site has spent so far.

    A round is one that was charged: numbers of rounds and runs are the server's to choose.

    Attributes:
        rounds: by federation.
        evaluations: of held-out rows, by federation.
        under: rounds and evaluations by agreement, and by which of the two.
        day_rounds: by day (UTC).
        day_bytes: most bytes of tensors that may have left, by day.
        mu_squared: cost of all noised updates (``client.privacy.noise``).
    """

    def __init__(self) -> None:
        self.rounds, self.evaluations = Counter[str](), Counter[str]()
        self.under = Counter[tuple[str | None, str]]()
        self.day_rounds, self.day_bytes = Counter[str](), Counter[str]()
        self.mu_squared = 0.0

    def add(self, entry: Entry) -> None:
        """Count an entry."""
        if entry["event"] == "charged":
            self.evaluations[entry["federation"]] += entry["evaluation"]
            self.under[entry.get("agreement"), "evaluations"] += entry["evaluation"]
            self.under[entry.get("agreement"), "rounds"] += entry["message"] == "train"
            bytes_ = entry["bytes"]
        elif entry["event"] == "sent" and "charged" not in entry:  # by a version that counted what had left
            bytes_ = entry["out"]["bytes"]
        else:
            return
        if entry["message"] != "train":
            return
        day = entry["time"][:10]
        self.rounds[entry["federation"]] += 1
        self.day_rounds[day] += 1
        self.day_bytes[day] += bytes_
        if entry["privacy"] is not None:
            self.mu_squared += cost(entry["privacy"]["noise_multiplier"])

    def check(
        self, site: SiteConfig, federation: FederationConfig, agreement: str | None, message: str, more_bytes: int = 0
    ) -> None:
        """Whether one more message may be answered, with so many bytes of tensors.

        Raises:
            PolicyError: names the limit.
        """
        policy, name, day = site.policy, federation.name, _today()
        if message == "evaluate":
            if self.evaluations_left(policy, federation, agreement) <= 0:
                most = most_evaluations(policy, federation)
                raise PolicyError(f"this site's policy: `max_evaluations` is {most}; all of them are made")
            return
        if self.under[agreement, "rounds"] >= _AGAIN * federation.rounds:
            raise PolicyError(
                f"this site agreed to {federation.rounds} rounds and has trained {_AGAIN} times as many; for more its "
                "people agree anew"
            )
        if policy.max_rounds is not None and self.rounds[name] >= policy.max_rounds:
            raise PolicyError(f"this site's policy: `max_rounds` is {policy.max_rounds}; all of them are trained")
        if site.privacy is not None:
            self._check_budget(site.privacy)
        if message == "hello":  # a day's limits are another tomorrow
            return
        limit = policy.max_rounds_per_day
        if limit is not None and self.day_rounds[day] >= limit:
            raise PolicyError(f"this site's policy: `max_rounds_per_day` is {limit}; all of them are trained today")
        limit, spent = policy.max_upload_bytes_per_day, self.day_bytes[day]
        if limit is not None and (spent >= limit or spent + more_bytes > limit):
            raise PolicyError(
                f"this site's policy: `max_upload_bytes_per_day` is {limit}; {spent} are spent today, a round takes up "
                f"to {more_bytes}"
            )

    def evaluations_left(self, policy: PolicyConfig, federation: FederationConfig, agreement: str | None) -> int:
        """How often held-out rows may still be scored for a federation."""
        counted = self.under[agreement, "evaluations"]
        if policy.max_evaluations is not None:
            counted = self.evaluations[federation.name]
        return most_evaluations(policy, federation) - counted

    def spent(self, privacy: PrivacyConfig) -> dict[str, float]:
        """What one more update costs, and all with it."""
        one = cost(privacy.noise_multiplier)
        told = {"epsilon_round": one, "epsilon_total": self.mu_squared + one}
        return {**privacy.model_dump(), **{key: epsilon(mu_squared, privacy.delta) for key, mu_squared in told.items()}}

    def _check_budget(self, privacy: PrivacyConfig) -> None:
        after = epsilon(self.mu_squared + cost(privacy.noise_multiplier), privacy.delta)
        if after > privacy.max_epsilon:
            so_far = epsilon(self.mu_squared, privacy.delta)
            raise PolicyError(
                f"this site's privacy: `max_epsilon` is {privacy.max_epsilon:g}; {so_far:.4g} are spent, one more "
                f"round would make it {after:.4g} (delta {privacy.delta:g})"
            )


def most_evaluations(policy: PolicyConfig, federation: FederationConfig) -> int:
    """How often held-out rows are scored for a federation: under one agreement, or as the site's policy has it, at all.

    Planned is one before every ``evaluation.every`` rounds and one after the last. A server that goes on after a crash
    asks for some of them again.
    """
    planned = math.ceil(federation.rounds / federation.evaluation.every) + 1
    return _AGAIN * planned if policy.max_evaluations is None else policy.max_evaluations


def rounded(scores: Mapping[str, float], step: float | None) -> dict[str, float]:
    """Scores as they leave; the perplexity is made of the rounded loss.

    Told exactly, for a state that was made for it, a mean over rows tells of single rows: two evaluations of states
    that differ in one row's loss give that loss to seven digits. So fewer than ``policy.min_held_out`` rows are not
    scored at all, and the others are rounded.

    - *Steps.* A score leaves as a multiple of 1 / rows, rounded up to 1, 2 or 5 times a power of ten. A row that counts
      one nat or one answer more moves the mean by 1 / rows, so what a row does by nature hides in one step. Honest
      curves lose nothing: the mean of n losses that spread by s has a standard error of s / sqrt(n), for s = 1 and 64
      rows 0.125; rounding to 0.02 adds 0.006 to it. Accuracies are multiples of 1 / rows as they are.
    - *A ceiling.* A loss above 20 nats, or one that is not finite, leaves as 20, else a state that makes one row's loss
      huge would lift it out of the steps. A loss then has at most 20 rows + 1 values, of 64 rows 10 bits.

    Rounding does not say whom those bits are about: a state may be made so that one row decides them. Their sum is
    bounded by the number of evaluations (``policy.max_evaluations``). No score leaves with `privacy` or
    ``policy.share_metrics: false``. Losses of training are not rounded: the update beside them, without noise, tells
    more of the same rows.

    Args:
        scores: by name, with the numbers of rows that they are means of.
        step: to multiples of which they are rounded; None: what that many rows can tell.
    """
    found = {}
    for name, score in scores.items():
        if name not in SCORES:  # a number of rows, or of their tokens
            found[name] = score
            continue
        rows = scores["generated" if SCORES[name].of == ANSWERS else "examples"]
        of = scores[_LOSS] if name == _PERPLEXITY else score
        value = _rounded(of, step_of(rows) if step is None else step)
        found[name] = math.exp(value) if name == _PERPLEXITY else value
    return found


def step_of(rows: float) -> float:
    """1 / rows, rounded up to 1, 2 or 5 times a power of ten."""
    exponent = math.floor(math.log10(1 / rows))
    return next(float(f"{digit}e{exponent}") for digit in (1, 2, 5, 10) if digit * 10.0**exponent * rows >= 1 - 1e-9)


def _rounded(value: float, step: float) -> float:
    """The nearest multiple of a step, as the nearest number to its decimals."""
    if not math.isfinite(value):
        return CEILING
    return float(f"{round(min(value, CEILING) / step) * step:.12g}")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
