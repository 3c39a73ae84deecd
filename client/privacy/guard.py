"""The gate through which every message comes into a site and every answer leaves it.

It refuses what the site file does not allow, keeps back what is not to be shared, and has everything in the ledger
before it leaves. What was done before is counted from the ledger alone, so a restart forgets nothing.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from client.privacy.agreement import Agreement, agreements_of, find, read_agreements
from client.privacy.ledger import Entry, Ledger
from client.privacy.noise import cost, epsilon, norm_of
from common.config.federation import FederationConfig
from common.config.site import PrivacyConfig, SiteConfig
from common.config.strategy import names
from common.errors import PUBLIC, DivergedError, FedSpanError, LedgerError, PolicyError
from common.protocol.digest import tensor_digest
from common.protocol.fields import Content
from common.protocol.messages import Failure, HelloRequest, State

BUNDLE = "FEDSPAN_BUNDLE"  # environment variable: digest of the bundle whose code this process runs
_PEFT = "base_model.model."  # what stands before the model's own names under LoRA
Reply = TypeVar("Reply", bound=Content)
log = logging.getLogger(__name__)


class Totals:
    """What has left the site so far, by its ledger.

    A round is an update that left: numbers of rounds and runs are the server's to choose.

    Attributes:
        rounds: by federation.
        day_rounds: by day (UTC).
        day_bytes: bytes of tensors, by day.
        mu_squared: cost of all noised updates (``client.privacy.noise``).
    """

    def __init__(self) -> None:
        self.rounds, self.day_rounds, self.day_bytes = Counter[str](), Counter[str](), Counter[str]()
        self.mu_squared = 0.0

    def add(self, entry: Entry) -> None:
        """Count an entry."""
        if entry["event"] != "sent" or entry["message"] != "train":
            return
        day = entry["time"][:10]
        self.rounds[entry["federation"]] += 1
        self.day_rounds[day] += 1
        self.day_bytes[day] += entry["out"]["bytes"]
        if entry["privacy"] is not None:
            self.mu_squared += cost(entry["privacy"]["noise_multiplier"])


def ledger_of(site: SiteConfig, site_file: Path, folder: Path | None = None) -> Path:
    """Where a site's ledger lies; in ``folder`` those of an experiment's cell (``deploy.experiment.trial``)."""
    return site.ledger_file(site_file) if folder is None else folder / site.ledger_name


_books: dict[tuple[Path, str], tuple[Ledger, Totals]] = {}  # by file and site, so that a process reads a ledger once


class Gate:
    """What may come in and leave, for one message.

    Args:
        site: the site file's content.
        site_file: where it lies.
        message: "hello", "train" or "evaluate".
        run: Flower's number of the run.
        agreements: file of what the site has agreed to; None: where the site file says.
        ledgers: folder of the ledger; None: likewise.
    """

    def __init__(
        self,
        site: SiteConfig,
        site_file: Path,
        message: str,
        run: int,
        agreements: Path | None = None,
        ledgers: Path | None = None,
    ) -> None:
        self.site = site
        self._agreements = agreements or agreements_of(site, site_file)
        book = ledger_of(site, site_file, ledgers), site.name
        if book not in _books:
            totals = Totals()
            _books[book] = Ledger(book[0], totals.add, site.name), totals
        self._ledger, self._totals = _books[book]
        self._active: frozenset[str] = frozenset()
        self._received = _facts([])
        self._about: dict[str, Any] = {"message": message, "run": str(run), "federation": None, "strategy": None}
        self._about |= {"round": None, "bundle": os.environ.get(BUNDLE, "not known")}

    def agreed(self, request: HelloRequest) -> Agreement:
        """What the site has agreed to, if that is what a request asks for.

        Raises:
            PolicyError: it is something else.
            ConfigError: the site's file of agreements is damaged.
        """
        return find(read_agreements(self._agreements), request.federation)

    def check(self, federation: FederationConfig, request: HelloRequest) -> None:
        """Look at a request before anything is done for it.

        Args:
            federation: what the server sent of its federation file.
            request: what else it sent.

        Raises:
            PolicyError: the site file does not allow it.
            LedgerError: the ledger is damaged or cannot be written.
        """
        number, active = (request.server_round, request.active) if isinstance(request, State) else (None, [])
        self._about |= {"federation": federation.name, "strategy": federation.strategy.name, "round": number}
        self._active = frozenset(active)
        policy, strategy = self.site.policy, federation.strategy.name
        for key, value, allowed in (
            ("federations", federation.name, policy.federations),
            ("strategies", strategy, policy.strategies),
            ("privacy", strategy, None if self.site.privacy is None else names(lambda section: section.private)),
        ):
            if allowed is not None and value not in allowed:
                raise PolicyError(f"this site's policy: `{key}` allows {', '.join(allowed)}; this is {value}")
        if self.site.privacy is not None and federation.strategy.optimizer_state == "averaged":
            raise PolicyError("this site's policy: `privacy` allows `optimizer_state` reset; averaged has no noise")
        for name in active:
            self._check_name(name)
        with self._ledger.opened():
            self._check_totals(0)

    def check_rows(self, rows: int) -> None:
        """Raise a PolicyError when the shard has fewer training rows than the policy asks for."""
        least = self.site.policy.min_examples
        if least is not None and rows < least:
            raise PolicyError(f"this site's policy: `min_examples` is {least}; it has fewer training rows")

    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        """Take note of the tensors that came with the message."""
        self._received = _facts(tensors.items())

    def shared(self, reply: Reply) -> Reply:
        """A reply without what stays here, as ``common.protocol.messages`` declares it."""
        return reply.shared(scores=self.site.shares_metrics, private=self.site.privacy is not None)

    def admit(
        self,
        sent: Iterable[tuple[str, Tensor]],
        told: list[str],
        rows: int,
        norm: float | None,
    ) -> None:
        """Check a reply and have it in the ledger; only then may it leave.

        Args:
            sent: tensors of the reply, by name.
            told: names of all else that the reply holds.
            rows: training rows.
            norm: of the last update, as it is to leave; None when there is none.

        Raises:
            PolicyError: it may not leave.
            DivergedError: the update is not finite.
            LedgerError: the ledger is damaged or cannot be written.
        """
        out, policy = _facts(sent), self.site.policy
        norm = norm if out["tensors"] else None
        for name in out["tensors"]:
            weight = name.partition("/")[0]  # of a factor
            if weight not in self._active:
                raise PolicyError(f"{weight} was not asked for, so it does not leave")
            self._check_name(weight)
        if norm is not None and not math.isfinite(norm):
            raise DivergedError("the update is not finite, so it does not leave")
        if norm is not None and policy.max_update_norm is not None and norm > policy.max_update_norm:
            raise PolicyError(
                f"this site's policy: `max_update_norm` is {policy.max_update_norm:g}; the update's norm is above it"
            )
        facts = {"event": "sent", **self._about, "rows": rows, "in": self._received, "out": out}
        with self._ledger.opened():
            self._check_totals(out["bytes"])
            self._append({**facts, "told": told, "update_norm": norm, "privacy": self._spent()})

    def refuse(self, error: Exception, failure: Failure) -> Failure:
        """Note that a message is answered with an error; the answer that leaves.

        Args:
            error: why.
            failure: the answer for the operator.
        """
        reason, code = failure.reason, failure.code
        if self.site.privacy is not None and not isinstance(error, PUBLIC):
            log.warning("not told to the operator: %s", reason)
            reason, code = "this site could not do its part; its own log says why", FedSpanError.code
        if self._about["message"] == "hello" and isinstance(error, FedSpanError):
            reason = f"{self.site.name}: {reason}"  # the server does not know yet who speaks
        kind = "refused" if isinstance(error, PolicyError) else "failed"
        log.warning("%s of federation %s %s: %s", self._about["message"], self._about["federation"], kind, reason)
        if not isinstance(error, LedgerError):
            try:
                with self._ledger.opened():
                    self._append({"event": kind, **self._about, "reason": reason})
            except LedgerError as damage:
                log.warning("%s", damage)
                return Failure.of(damage)
        return Failure(code, reason)

    def _append(self, facts: dict[str, Any]) -> None:
        if self._ledger.lines == 0:
            self._ledger.append({"event": "begun", "site": self.site.name, "format": 1})
        self._ledger.append(facts)

    def _check_name(self, name: str) -> None:
        patterns = self.site.policy.tensors
        if patterns is None:
            return
        if not any(fnmatchcase(own, p) for p in patterns for own in (name, name.removeprefix(_PEFT))):
            raise PolicyError(f"this site's policy: `tensors` allows {', '.join(patterns)}; asked was {name}")

    def _check_totals(self, more_bytes: int) -> None:
        """Whether one more update may leave, of so many bytes; nothing counts but training."""
        policy, totals, message, day = self.site.policy, self._totals, self._about["message"], _today()
        if message == "evaluate":
            return
        if policy.max_rounds is not None and totals.rounds[self._about["federation"]] >= policy.max_rounds:
            raise PolicyError(f"this site's policy: `max_rounds` is {policy.max_rounds}; all of them are trained")
        if self.site.privacy is not None:
            self._check_budget(self.site.privacy)
        if message == "hello":  # a day's limits are another tomorrow
            return
        most = policy.max_rounds_per_day
        if most is not None and totals.day_rounds[day] >= most:
            raise PolicyError(f"this site's policy: `max_rounds_per_day` is {most}; all of them are trained today")
        most, spent = policy.max_upload_bytes_per_day, totals.day_bytes[day]
        if most is not None and (spent >= most or spent + more_bytes > most):
            raise PolicyError(f"this site's policy: `max_upload_bytes_per_day` is {most}; {spent} have left today")

    def _check_budget(self, privacy: PrivacyConfig) -> None:
        after = epsilon(self._totals.mu_squared + cost(privacy.noise_multiplier), privacy.delta)
        if after > privacy.max_epsilon:
            so_far = epsilon(self._totals.mu_squared, privacy.delta)
            raise PolicyError(
                f"this site's privacy: `max_epsilon` is {privacy.max_epsilon:g}; {so_far:.4g} are spent, one more "
                f"round would make it {after:.4g} (delta {privacy.delta:g})"
            )

    def _spent(self) -> dict[str, float] | None:
        """What this update costs, and all with it."""
        privacy = self.site.privacy
        if privacy is None or self._about["message"] != "train":
            return None
        one, total = cost(privacy.noise_multiplier), self._totals.mu_squared + cost(privacy.noise_multiplier)
        spent = {"epsilon_round": epsilon(one, privacy.delta), "epsilon_total": epsilon(total, privacy.delta)}
        return {**privacy.model_dump(), **spent}


def _facts(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Names, types, shapes, bytes, digests and norms; never a value."""
    found: dict[str, list[object]] = {}
    size = 0
    for name, tensor in tensors:
        number = tensor.numel() * tensor.element_size()
        norm = norm_of([tensor if tensor.is_floating_point() else tensor.to(torch.float32)])
        shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        found[name] = [dtype, shape, number, tensor_digest(tensor), norm if math.isfinite(norm) else None]
        size += number
    return {"bytes": size, "tensors": found}


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
