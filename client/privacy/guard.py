"""The guard of a site's policy: checks every request before work starts, and every reply before it leaves.

It rejects requests and replies that the site file does not allow, removes values that stay at the site, and writes
every reply into the ledger before the reply leaves. The cost of a message is charged in the ledger before a row is
read, and stays charged even if the work fails. Past use is counted from the ledger alone, so a restart loses no count
(decision 014).
"""

import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from client.privacy.agreement import Agreement, agreements_of, find, read_agreements
from client.privacy.budget import Totals, rounded
from client.privacy.ledger import Ledger
from client.privacy.noise import norm_of
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.config.strategy import names
from common.errors import PUBLIC, SAID, DivergedError, FedSpanError, LedgerError, PolicyError
from common.protocol.digest import tensor_digest
from common.protocol.fields import Content
from common.protocol.messages import EvaluateReply, Failure, HelloRequest, State

BUNDLE = "FEDSPAN_BUNDLE"  # environment variable: digest of the bundle whose code this process runs
_PEFT = "base_model.model."  # PEFT's prefix of the model's own names
Reply = TypeVar("Reply", bound=Content)
log = logging.getLogger(__name__)


def ledger_of(site: SiteConfig, site_file: Path, folder: Path | None = None) -> Path:
    """Path of a site's ledger; ``folder`` is given for an experiment's trials (``deploy.experiment.trial``)."""
    return site.ledger_file(site_file) if folder is None else folder / site.ledger_name


_told: set[tuple[int, str, str]] = set()  # why no scores leave, by ledger and run: the log says so once
_books: dict[tuple[Path, str], tuple[Ledger, Totals]] = {}  # by file and site, so that a process reads a ledger once


class Gate:
    """Checks one message and the reply to it.

    Args:
        site: the site file's content.
        site_file: the site file's path.
        message: "hello", "train", "evaluate", "exchange" or "deliver".
        run: Flower's number of the run.
        agreements: file with the site's agreements; None: the path in the site file.
        ledgers: folder for the ledger; None: the path in the site file.

    Attributes:
        own: folder for what the site trains and never sends, by federation.
        totals: the use that the ledger tells of, up to date after ``check``.
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
        self.own = ledger_of(site, site_file, ledgers).parent / f"{site.name}-own"
        self._agreements = agreements or agreements_of(site, site_file)
        book = ledger_of(site, site_file, ledgers), site.name
        if book not in _books:
            totals = Totals()
            _books[book] = Ledger(book[0], totals.add, site.name), totals
        self._ledger, self.totals = _books[book]
        self._active: frozenset[str] = frozenset()
        self._received = _facts([])
        self._about: dict[str, Any] = {"message": message, "run": str(run), "federation": None, "strategy": None}
        self._about |= {"round": None, "agreement": None, "bundle": os.environ.get(BUNDLE, "not known")}
        self._federation: FederationConfig | None = None
        self._charged: dict[str, Any] | None = None  # the charge in the ledger for this message

    def agreed(self, request: HelloRequest) -> Agreement:
        """The site's agreement to the settings in a request.

        Raises:
            PolicyError: the site has not agreed to these settings.
            ConfigError: the site's file of agreements is damaged.
        """
        found = find(read_agreements(self._agreements), request.federation)
        self._about["agreement"] = f"{found.digest[:16]} {found.agreed}"
        return found

    def check(self, federation: FederationConfig, request: HelloRequest) -> None:
        """Check a request before any work is done for it.

        Args:
            federation: the federation's settings in the request.
            request: the request.

        Raises:
            PolicyError: the site file does not allow the request.
            LedgerError: the ledger is damaged or cannot be written.
        """
        number, active = getattr(request, "server_round", None), request.active if isinstance(request, State) else []
        self._about |= {"federation": federation.name, "strategy": federation.strategy.name, "round": number}
        self._active, self._federation = frozenset(active), federation
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
        self._check_touched(federation.training.rows_touched(sys.maxsize))
        with self._ledger.opened():
            if self._about["message"] != "exchange":  # it belongs to a round, which is checked and charged as such
                self.totals.check(self.site, federation, self._about["agreement"], self._about["message"])

    def note(self, **facts: object) -> None:
        """Add facts to all entries of the ledger about this message."""
        self._about |= facts

    def check_rows(self, rows: int) -> None:
        """Raise a PolicyError when the shard, or a round, has fewer training rows than the policy asks for."""
        assert self._federation is not None  # noqa: S101 - ``check`` comes first
        least = self.site.policy.min_examples
        if least is not None and rows < least:
            raise PolicyError(f"this site's policy: `min_examples` is {least}; it has fewer training rows")
        self._check_touched(self._federation.training.rows_touched(rows))

    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        """Record the tensors that came with the message."""
        self._received = _facts(tensors.items())

    def charge(self, most_bytes: int, scored_rows: int) -> bool:
        """Charge the cost of a message in the ledger, before a row is read for it; charges are never taken back.

        Args:
            most_bytes: upper limit of the bytes of tensors that the reply will have.
            scored_rows: number of held-out rows to score; 0: none.

        Returns:
            Whether the held-out rows may be scored.

        Raises:
            PolicyError: a limit does not allow the message.
            LedgerError: the ledger is damaged or cannot be written.
        """
        assert self._federation is not None  # noqa: S101 - ``check`` comes first
        message, federation = self._about["message"], self._federation
        with self._ledger.opened():
            self.totals.check(self.site, federation, self._about["agreement"], message, most_bytes)
            scores = self._may_score(scored_rows)
            if message == "train" or scores:
                privacy = self.site.privacy if message == "train" else None
                spent = None if privacy is None else self.totals.spent(privacy, federation)
                facts = {"bytes": most_bytes, "evaluation": scores, "privacy": spent}
                self._append({"event": "charged", **self._about, **facts})
                self._charged = {**facts, "line": self._ledger.lines}
        return scores

    def shared(self, reply: Reply) -> Reply:
        """A reply without the values that stay at the site (``common.protocol.messages``), and with rounded scores."""
        shared = reply.shared(scores=self.site.shares_metrics, private=self.site.privacy is not None)
        if isinstance(shared, EvaluateReply):
            shared = replace(shared, scores=rounded(shared.scores, self.site.policy.score_step))
        return shared

    def admit(
        self,
        sent: Iterable[tuple[str, Tensor]],
        told: list[str],
        rows: int,
        norm: float | None,
        aside: str | None = None,
    ) -> None:
        """Check a reply and write it into the ledger; only then may it leave.

        Args:
            sent: tensors of the reply, by name.
            told: names of all other values in the reply.
            rows: number of training rows.
            norm: L2 norm of the update in the form to send; None: no update.
            aside: error that is hidden from the operator and goes into the ledger only.

        Raises:
            PolicyError: the reply may not leave.
            DivergedError: the update is not finite.
            LedgerError: the ledger is damaged or cannot be written.
        """
        out, policy = _facts(sent), self.site.policy
        norm = norm if out["tensors"] else None
        assert self._federation is not None  # noqa: S101 - ``check`` comes first
        if self._federation.secure_aggregation is not None:
            if bare := [name for name, (dtype, *_) in out["tensors"].items() if dtype != "int32"]:
                raise PolicyError(f"{bare[0]} does not leave: with `secure_aggregation` only masked integers do")
        for name in out["tensors"]:
            weight = name.partition("/")[0]  # a factor's name begins with its weight's
            if weight not in self._active:
                raise PolicyError(f"{weight} was not asked for, so it does not leave")
            self._check_name(weight)
        if norm is not None and not math.isfinite(norm):
            raise DivergedError("the update is not finite, so it does not leave")
        if norm is not None and policy.max_update_norm is not None and norm > policy.max_update_norm:
            raise PolicyError(
                f"this site's policy: `max_update_norm` is {policy.max_update_norm:g}; the update's norm is above it"
            )
        charged = self._charged or {"line": None, "bytes": 0, "privacy": None}
        if out["bytes"] > charged["bytes"]:
            raise PolicyError(f"{out['bytes']} bytes of tensors do not leave: {charged['bytes']} were charged")
        facts = {"event": "sent", **self._about, "charged": charged["line"], "rows": rows, "in": self._received}
        facts |= {"out": out, "told": told, "update_norm": norm, "privacy": charged["privacy"], "aside": aside}
        with self._ledger.opened():
            self._append(facts)

    def refuse(self, error: Exception, failure: Failure) -> Failure:
        """Write into the ledger that a message is answered with an error; returns the answer to send.

        Args:
            error: the error.
            failure: the answer for the operator.
        """
        reason, code = failure.reason, failure.code
        private = self.site.privacy is not None
        if not isinstance(error, PUBLIC) and (private or (self._charged and isinstance(error, FedSpanError))):
            log.warning("not told to the operator: %s", reason)
            kind = FedSpanError if private else next(kind for kind in type(error).__mro__ if kind in SAID)
            code = FedSpanError.code if private else code
            reason = f"{SAID[kind]}; the site's own log says more"
        if self._about["message"] == "hello" and isinstance(error, FedSpanError):
            reason = f"{self.site.name}: {reason}"  # the server does not know the site's name yet
        event = "refused" if isinstance(error, PolicyError) else "failed"
        if not isinstance(error, LedgerError):
            try:
                with self._ledger.opened():
                    self._append({"event": event, **self._about, "reason": reason})
            except LedgerError as damage:
                log.warning("%s", damage)
                return Failure.of(damage)
        return Failure(code, reason)

    def _check_touched(self, rows: int) -> None:
        least = self.site.policy.min_rows_per_update
        if rows < least:
            raise PolicyError(
                f"this site's policy: `min_rows_per_update` is {least}; a round here trains on fewer rows"
            )

    def _may_score(self, rows: int) -> bool:
        """Whether scores of ``rows`` held-out rows may leave; the log has the reason if not."""
        assert self._federation is not None  # noqa: S101 - the caller has checked
        policy = self.site.policy
        if 0 < rows < policy.min_held_out:
            why = f"of {rows} held-out rows, `policy.min_held_out` is {policy.min_held_out}"
        elif rows > 0 and self.totals.evaluations_left(policy, self._federation, self._about["agreement"]) <= 0:
            why = "all evaluations that `policy.max_evaluations` allows are made"
        else:
            return rows > 0
        if (told := (id(self._ledger), self._about["run"], why)) not in _told:
            _told.add(told)
            log.warning("no scores leave: %s", why)
        return False

    def _append(self, facts: dict[str, Any]) -> None:
        if self._ledger.lines == 0:
            self._ledger.append({"event": "begun", "site": self.site.name, "format": 2})
        self._ledger.append(facts)

    def _check_name(self, name: str) -> None:
        patterns = self.site.policy.tensors
        if patterns is None:
            return
        if not any(fnmatchcase(own, p) for p in patterns for own in (name, name.removeprefix(_PEFT))):
            raise PolicyError(f"this site's policy: `tensors` allows {', '.join(patterns)}; asked was {name}")


def _facts(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Names, dtypes, shapes, bytes, digests and norms of tensors; never a value."""
    found: dict[str, list[object]] = {}
    size = 0
    for name, tensor in tensors:
        number = tensor.numel() * tensor.element_size()
        masked = tensor.dtype == torch.int32  # words that look random: their norm says nothing
        norm = math.nan if masked else norm_of([tensor if tensor.is_floating_point() else tensor.to(torch.float32)])
        shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        found[name] = [dtype, shape, number, tensor_digest(tensor), norm if math.isfinite(norm) else None]
        size += number
    return {"bytes": size, "tensors": found}
