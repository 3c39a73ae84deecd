"""A site gives keys only with an identity, approved peers and a process that lives on; and for each round once."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import masked
from client.masked import Member
from client.privacy.agreement import make_agreement
from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import ConfigError, FedSpanError, PolicyError, StaleStateError
from common.masking.site import SiteSum
from common.protocol.exchanges import KEYS, SHARES, SURVIVORS, UNMASK, ExchangeRequest
from common.system.keys import make_site
from deploy.cli import main

FILE: dict[str, Any] = {"name": "x", "model": {"path": "m"}, "strategy": "fedit", "rounds": 3}
FILE |= {"cohort": {"min_clients": 3}, "training": {"learning_rate": 0.1, "local_steps": 1}}


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Member:
    monkeypatch.setenv(masked.LONG_LIVED, "1")
    monkeypatch.setattr(masked, "_sums", {})
    own = make_site(tmp_path / "a")
    federation = parse({**FILE, "secure_aggregation": {"threshold": 2}}, FederationConfig, "f")
    agreement = make_agreement(federation).model_copy(update={"peers": {"a": own, "b": "SHA256:x"}})
    return Member("a", 7, agreement, tmp_path / "a.key", None)


def ask(stage: str, number: int = 1, attempt: int = 0, payload: bytes = b"") -> ExchangeRequest:
    about: dict[str, Any] = {"federation": "{}", "signatures": None, "server_round": number, "attempt": attempt}
    return ExchangeRequest(**about, stage=stage, payload=payload)


def refused(member: Member, request: ExchangeRequest, kind: type[FedSpanError], text: str) -> None:
    with pytest.raises(kind, match=text):
        member.exchange(request)


def test_keys_are_new_in_every_round_and_given_once(member: Member) -> None:
    seen = {member.exchange(ask(KEYS, number, attempt)) for number, attempt in ((1, 0), (1, 1), (2, 0))}
    assert len(seen) == 3
    for number, attempt in ((2, 0), (1, 2)):
        request = ask(KEYS, number, attempt)
        refused(member, request, PolicyError, f"round {number}: keys of this round, or a later one, were given already")


def test_process_without_the_rounds_keys_drops_out(member: Member) -> None:
    member.exchange(ask(KEYS, 2))
    for number, attempt in ((1, 0), (2, 1), (3, 0)):
        request = ask(SHARES, number, attempt)
        refused(member, request, StaleStateError, f"no keys of round {number}; it drops out of this round")
    masked._sums.clear()
    refused(member, ask(SHARES, 2), StaleStateError, "no keys of round 2")


def ahead(member: Member, number: int, attempt: int = 0, unmasked: int = 0) -> bytes | None:
    """The keys of the round after this one, as they go with a masked update."""
    request: Any = SimpleNamespace(server_round=number, attempt=attempt, wants_keys=True)
    return member.keys_ahead(request, unmasked)


def test_keys_that_went_ahead_are_used_when_that_rounds_training_begins(member: Member) -> None:
    member.exchange(ask(KEYS, 1))
    assert ahead(member, 1)
    refused(member, ask(SHARES, 2), StaleStateError, "no keys of round 2")  # round 1 is still to be unmasked
    assert member._sum(1, 0) is not None
    assert member._sum(2, 0, begins=True) is not None
    refused(member, ask(SURVIVORS, 1), StaleStateError, "no keys of round 1")
    refused(member, ask(KEYS, 1, 1), PolicyError, "round 1: keys of this round, or a later one, were given already")


def test_keys_that_went_ahead_are_forgotten_when_a_round_begins_anew(member: Member) -> None:
    member.exchange(ask(KEYS, 1))
    first = ahead(member, 1)
    member.exchange(ask(KEYS, 1, 1))
    with pytest.raises(StaleStateError, match="no keys of round 2"):
        member._sum(2, 0, begins=True)
    with pytest.raises(StaleStateError, match="no keys of the next round"):
        member.share_ahead(b"")
    second = ahead(member, 1, 1)
    assert second is not None
    assert second != first


def test_keys_that_went_ahead_are_not_given_again_but_by_another_attempt(member: Member) -> None:
    member.exchange(ask(KEYS, 1))
    ahead(member, 1)
    refused(member, ask(KEYS, 2), PolicyError, "round 2: keys of this round, or a later one, were given already")
    assert member.exchange(ask(KEYS, 2, 1))
    with pytest.raises(StaleStateError, match="no keys of round 2"):
        member._sum(2, 0, begins=True)


def test_keys_go_ahead_for_no_round_that_does_not_come_or_was_unmasked(member: Member) -> None:
    member.exchange(ask(KEYS, 3))
    with pytest.raises(PolicyError, match="round 4: the last one is round 3"):
        ahead(member, 3)
    with pytest.raises(PolicyError, match="round 2: this site has helped to unmask a sum of this round"):
        ahead(member, 1, unmasked=2)


def test_worker_is_held_until_no_keys_are_left(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteSum, "unmask", lambda *_: b"")
    monkeypatch.delenv(masked.HOLDS, raising=False)
    member.exchange(ask(KEYS, 1))
    ahead(member, 1)
    member.exchange(ask(UNMASK, 1))
    assert masked.HOLDS in os.environ
    member._sum(2, 0, begins=True)
    member.exchange(ask(UNMASK, 2))
    assert masked.HOLDS not in os.environ
    member.exchange(ask(KEYS, 3))
    member.forget()  # the run has ended
    assert masked.HOLDS not in os.environ


def test_worker_that_is_new_after_a_sum_was_unmasked_gives_no_keys_for_another(member: Member) -> None:
    for number in (1, 2):
        with pytest.raises(PolicyError, match=f"round {number}: this site has helped to unmask a sum of this round"):
            member.exchange(ask(KEYS, number, 1), unmasked=2)
    assert member.exchange(ask(KEYS, 3), unmasked=2)


def test_nothing_is_given_without_identity_peers_worker_or_agreement(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(replace(member, identity=None), ask(KEYS), ConfigError, "give --auth-supernode-private-key FILE")
    assert main(["code", "key", str(tmp_path / "reviewer")]) == 0
    other = replace(member, identity=tmp_path / "reviewer.key")
    refused(other, ask(KEYS), ConfigError, "reviewer.key: no ECDSA P-384 key")
    alone = replace(member, agreement=member.agreement.model_copy(update={"peers": {}}))
    refused(alone, ask(KEYS), PolicyError, "has agreed to no peers; its people do so with: fedspan site agree --peer")
    plain = make_agreement(parse(FILE, FederationConfig, "f"))
    refused(replace(member, agreement=plain), ask(KEYS), PolicyError, "has agreed to no `secure_aggregation`")
    monkeypatch.delenv(masked.LONG_LIVED)
    refused(member, ask(KEYS), ConfigError, "a: `secure_aggregation` needs a worker")
