"""A site gives keys only with an identity, approved peers and a process that lives on; and for each round once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import masked
from client.masked import Member
from client.privacy.agreement import make_agreement
from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import ConfigError, FedSpanError, PolicyError, StaleStateError
from common.protocol.exchanges import KEYS, SHARES, ExchangeRequest
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
