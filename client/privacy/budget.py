"""A site's budget: the use charged in its ledger, the limits, and the rounding of scores.

Use counts from the moment that it is charged, before a row is read. A crash or an error during the round or evaluation
does not give it back.
"""

import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from client.privacy.guarantee import in_federation
from client.privacy.ledger import Entry
from common.accountant import cost, epsilon
from common.config.federation import FederationConfig
from common.config.site import PolicyConfig, PrivacyConfig, SiteConfig
from common.errors import PolicyError
from common.metrics import ANSWERS, SCORES
from common.protocol.exchanges import UNMASK

CEILING = 20.0  # nats
_LOSS, _PERPLEXITY = "loss", "perplexity"
AGAIN = 3  # limit, as a multiple of an agreement's rounds and evaluations: work lost in a crash is asked for again


class Totals:
    """Totals of the use charged so far.

    A round is one that was charged; numbers of rounds and runs in messages do not count, because the server chooses
    them.

    Attributes:
        rounds: number of rounds, by federation.
        evaluations: number of evaluations of held-out rows, by federation.
        under: numbers of "rounds" and "evaluations", by pairs (agreement, one of these words).
        day_rounds: number of rounds, by day (UTC).
        day_bytes: upper limit of the bytes of tensors that have left, by day (UTC).
        mu_squared: sum of mu^2 over all updates with noise (``common.accountant``).
        worst_squared: the same with only the site's own part of the noise (``client.privacy.guarantee``).
        unmasked: the last round whose masked sum the site has helped to unmask, by Flower's number of the run.
    """

    def __init__(self) -> None:
        self.rounds, self.evaluations = Counter[str](), Counter[str]()
        self.under = Counter[tuple[str | None, str]]()
        self.day_rounds, self.day_bytes = Counter[str](), Counter[str]()
        self.mu_squared = self.worst_squared = 0.0
        self.unmasked = Counter[str]()

    def add(self, entry: Entry) -> None:
        """Count an entry."""
        if entry["event"] == "sent" and entry.get("stage") == UNMASK:
            self.unmasked[entry["run"]] = max(self.unmasked[entry["run"]], entry["round"])
        if entry["event"] == "charged":
            self.evaluations[entry["federation"]] += entry["evaluation"]
            self.under[entry.get("agreement"), "evaluations"] += entry["evaluation"]
            self.under[entry.get("agreement"), "rounds"] += entry["message"] == "train"
            bytes_ = entry["bytes"]
        elif entry["event"] == "sent" and "charged" not in entry:  # an earlier version counted replies, not charges
            bytes_ = entry["out"]["bytes"]
        else:
            return
        if entry["message"] != "train":
            return
        day = entry["time"][:10]
        self.rounds[entry["federation"]] += 1
        self.day_rounds[day] += 1
        self.day_bytes[day] += bytes_
        if (privacy := entry["privacy"]) is not None:
            self.mu_squared += cost(privacy["noise_multiplier"])
            self.worst_squared += cost(privacy.get("worst_multiplier", privacy["noise_multiplier"]))

    def check(
        self, site: SiteConfig, federation: FederationConfig, agreement: str | None, message: str, more_bytes: int = 0
    ) -> None:
        """Check the limits for one more message with ``more_bytes`` of tensors.

        Raises:
            PolicyError: a limit does not allow the message; the text names the limit.
        """
        policy, name, day = site.policy, federation.name, _today()
        if message == "deliver":  # nothing of the rows leaves
            return
        if message == "evaluate":
            if self.evaluations_left(policy, federation, agreement) <= 0:
                most = most_evaluations(policy, federation)
                raise PolicyError(f"this site's policy: `max_evaluations` is {most}; all of them are made")
            return
        if self.under[agreement, "rounds"] >= AGAIN * federation.rounds:
            raise PolicyError(
                f"this site agreed to {federation.rounds} rounds and has trained {AGAIN} times as many; for more its "
                "people agree anew"
            )
        if policy.max_rounds is not None and self.rounds[name] >= policy.max_rounds:
            raise PolicyError(f"this site's policy: `max_rounds` is {policy.max_rounds}; all of them are trained")
        if site.privacy is not None:
            self._check_budget(site.privacy, in_federation(site.privacy, federation).noise_multiplier)
        if message == "hello":  # the limits of a day do not matter for joining
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
        """Number of evaluations that are left for a federation."""
        counted = self.under[agreement, "evaluations"]
        if policy.max_evaluations is not None:
            counted = self.evaluations[federation.name]
        return most_evaluations(policy, federation) - counted

    def spent(self, privacy: PrivacyConfig, federation: FederationConfig) -> dict[str, Any]:
        """The noise of one more update; epsilon of this update, of all updates with it, and of all at worst."""
        found = in_federation(privacy, federation)
        one, worst = cost(found.noise_multiplier), self.worst_squared + cost(found.worst_multiplier)
        told = {"epsilon_round": one, "epsilon_total": self.mu_squared + one, "epsilon_worst": worst}
        facts: dict[str, Any] = privacy.model_dump()
        facts |= {"noise_multiplier": found.noise_multiplier, "worst_multiplier": found.worst_multiplier}
        for key, mu_squared in told.items():
            value = epsilon(mu_squared, privacy.delta)
            facts[key] = value if math.isfinite(value) else None  # JSON has no infinity
        return facts

    def _check_budget(self, privacy: PrivacyConfig, noise_multiplier: float) -> None:
        after = epsilon(self.mu_squared + cost(noise_multiplier), privacy.delta)
        if after > privacy.max_epsilon:
            so_far = epsilon(self.mu_squared, privacy.delta)
            raise PolicyError(
                f"this site's privacy: `max_epsilon` is {privacy.max_epsilon:g}; {so_far:.4g} are spent, one more "
                f"round would make it {after:.4g} (delta {privacy.delta:g})"
            )


def most_evaluations(policy: PolicyConfig, federation: FederationConfig) -> int:
    """Limit of the evaluations for a federation: under one agreement, or by ``policy.max_evaluations`` in total.

    The settings plan one evaluation before every ``evaluation.every`` rounds and one after the last. A server that
    resumes after a crash repeats some of them.
    """
    planned = math.ceil(federation.rounds / federation.evaluation.every) + 1
    return AGAIN * planned if policy.max_evaluations is None else policy.max_evaluations


def rounded(scores: Mapping[str, float], step: float | None) -> dict[str, float]:
    """Round scores before they leave; the perplexity is computed from the rounded loss.

    An exact mean over rows can reveal single rows, if the server crafts the state: two evaluations of states that
    differ in one row's loss give that loss to seven digits. So a site does not score fewer than
    ``policy.min_held_out`` rows, and rounds all scores.

    - *Steps.* A score is rounded to a multiple of 1 / rows, where 1 / rows is itself rounded up to 1, 2 or 5 times a
      power of ten. A row with one nat or one right answer more moves the mean by 1 / rows, so the usual effect of one
      row is hidden in a step. Honest curves lose nothing: the mean of n losses with standard deviation s has a standard
      error of s / sqrt(n), which is 0.125 for s = 1 and 64 rows; rounding to 0.02 adds 0.006. Accuracies are multiples
      of 1 / rows anyway.
    - *A ceiling.* A loss above 20 nats, or one that is not finite, is sent as 20; else a state that makes one row's
      loss huge could reveal that row in spite of the steps. So a loss has at most 20 rows + 1 values: for 64 rows, 10
      bits.

    Rounding cannot decide which rows those bits are about: a crafted state may let one row decide. The number of
    evaluations limits the sum of all bits (``policy.max_evaluations``). With `privacy` or
    ``policy.share_metrics: false`` no score leaves. Training losses are not rounded: the update that is sent beside
    them, without noise, reveals more about the same rows.

    Args:
        scores: scores by name, with the numbers of rows that they are means of.
        step: scores are rounded to multiples of it; None: 1 / rows, see above.
    """
    found = {}
    for name, score in scores.items():
        if name not in SCORES:  # a count of rows or tokens
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
    """The nearest multiple of a step, without binary rounding errors in its decimals."""
    if not math.isfinite(value):
        return CEILING
    return float(f"{round(min(value, CEILING) / step) * step:.12g}")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
