"""How many sites' sessions a process holds."""

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client import app as client
from client.privacy.agreement import make_agreement
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from deploy.sandbox.tiny import make_federation


def test_process_holds_as_many_sessions_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 17, "site-c": 9})
    agreement = make_agreement(resolved(load(file, FederationConfig), file))

    def session(site: str) -> object:
        site_file = tmp_path / f"{site}.yaml"
        context = Context(1, 2, {"site": str(site_file)}, RecordDict(), {})
        return client._session(load(site_file, SiteConfig), agreement, context)

    monkeypatch.setattr(client, "_sessions", {})
    first = session("site-a")
    assert session("site-a") is first
    session("site-b")
    assert session("site-a") is not first  # one at a time
    monkeypatch.setenv(client.SESSIONS, "2")
    a, b = session("site-a"), session("site-b")
    assert (session("site-a"), session("site-b")) == (a, b)
    c = session("site-c")  # the oldest makes room
    assert (session("site-b"), session("site-c")) == (b, c)
    assert session("site-a") is not a
