"""The limits that a site has set, and how much of each is used."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from client.privacy.agreement import Agreement
from client.privacy.budget import AGAIN, Totals, most_evaluations
from common.accountant import epsilon
from common.config.site import SiteConfig
from common.web.format import size, whole


@dataclass(frozen=True)
class Limit:
    """A limit.

    Attributes:
        what: the limit in words; ``key``: its key in the site file, "" for one that is always there.
        used: the use so far; ``most``: the limit; both in words.
        share: used of the limit, up to 1.
    """

    what: str
    key: str
    used: str
    most: str
    share: float


def limits(site: SiteConfig, agreements: Mapping[str, Agreement], totals: Totals) -> Iterator[Limit]:
    """All limits of a site that count something.

    Raises:
        ConfigError: this version of FedSpan does not know the settings of an agreement.
    """
    policy = site.policy
    for name, agreement in agreements.items():
        federation, under = agreement.federation, f"{agreement.digest[:16]} {agreement.agreed}"
        most = AGAIN * federation.rounds
        yield _counted(f"{name}: rounds under this agreement", "", totals.under[under, "rounds"], most)
        if policy.max_rounds is not None:
            yield _counted(f"{name}: rounds in all", "policy.max_rounds", totals.rounds[name], policy.max_rounds)
        most = most_evaluations(policy, federation)
        used = most - totals.evaluations_left(policy, federation, under)
        key = "" if policy.max_evaluations is None else "policy.max_evaluations"
        yield _counted(f"{name}: evaluations of held-out rows", key, used, most)
    day = datetime.now(UTC).date().isoformat()
    if (most_rounds := policy.max_rounds_per_day) is not None:
        yield _counted("Rounds today (UTC)", "policy.max_rounds_per_day", totals.day_rounds[day], most_rounds)
    if (most_bytes := policy.max_upload_bytes_per_day) is not None:
        sent = totals.day_bytes[day]
        share = min(sent / most_bytes, 1.0)
        yield Limit("Upload today (UTC)", "policy.max_upload_bytes_per_day", size(sent), size(most_bytes), share)
    if (privacy := site.privacy) is not None:
        spent = epsilon(totals.mu_squared, privacy.delta) if totals.mu_squared else 0.0
        what = f"Privacy spent: epsilon at delta {privacy.delta:g}"
        share = min(spent / privacy.max_epsilon, 1.0)
        yield Limit(what, "privacy.max_epsilon", f"{spent:.3g}", f"{privacy.max_epsilon:g}", share)


def _counted(what: str, key: str, used: int, most: int) -> Limit:
    return Limit(what, key, whole(used), whole(most), min(used / most, 1.0))
