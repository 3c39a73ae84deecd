"""The SuperNode with a pause of one's own choice."""

import threading
import time
from pathlib import Path

import pytest
import yaml
from flwr.app import Context, RecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest

from client.connect import link
from client.connect.link import _Turns
from client.privacy.agreement import make_agreement
from client.watch.link_state import LinkState
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError
from deploy.cli import main
from deploy.sandbox.tiny import make_federation


def test_flower_still_pauses_and_answers_workers_through_its_modules() -> None:
    from flwr.supernode import main, start_client_internal
    from flwr.supernode.servicer.runtime import runtime_handlers

    assert start_client_internal.time is time  # type: ignore[attr-defined]
    assert main._RUNTIME_HANDLERS is runtime_handlers
    assert turns(0.1).monotonic is time.monotonic


def turns(longest: float) -> _Turns:
    return _Turns(LinkState("127.0.0.1:1"), longest)


@pytest.mark.parametrize(("seconds", "longest"), [(3.0, 0.5), (0.2, 0.5)])
def test_pause_is_cut_to_the_longest(seconds: float, longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout: waited.append(timeout))
    turns(longest).sleep(seconds)
    assert waited == [min(seconds, longest)]


def test_an_answer_of_the_worker_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_complete", lambda *_: "done")
    this = turns(600.0)
    threading.Timer(0.05, this.complete, args=("request", "state", "task")).start()
    this.sleep(600.0)


def polled(this: _Turns, seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses after a poll whose empty answer took so long."""
    now, waited = [100.0], list[float]()

    def answer() -> None:
        now[0] += seconds

    monkeypatch.setattr(link, "_receive", lambda receive: receive())
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout: waited.append(timeout))
    this.receive(receive=answer)
    this.sleep(3.0)
    this.sleep(3.0)
    return waited


def test_no_pause_follows_a_poll_that_the_superlink_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert polled(turns(1.0), 5.0, monkeypatch) == [1.0]
    assert polled(turns(1.0), 0.1, monkeypatch) == [1.0, 1.0]


def test_worker_is_answered_when_a_message_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    this, order = turns(1.0), list[str]()

    def came(receive: object) -> int:
        order.append("came")
        return 7

    monkeypatch.setattr(link, "_receive", came)
    monkeypatch.setattr(link, "_acquire", lambda *_: order.append("acquired"))
    monkeypatch.setattr(link, "_WORKER_WAITS", 600.0)
    threading.Timer(0.05, this.receive, kwargs={"receive": lambda: None}).start()
    this.acquire(AcquireTaskRequest(), None)
    assert order == ["came", "acquired"]


@pytest.mark.parametrize("poll", ["0", "-1", "nan", "61"])
def test_pause_outside_its_limits_is_refused(poll: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "supernode", "--poll", poll]) == 2
    assert "allowed: 0.05 to 60 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--superlink", "127.0.0.1:1"], "give --superlink HOST:PORT, and --root-certificates FILE"),
        (["--superlink", "nowhere", "--insecure"], "--superlink: 'nowhere'; allowed: HOST:PORT"),
        (["--superlink", "127.0.0.1:1", "--root-certificates", "/none/ca.crt"], "/none/ca.crt: cannot be read"),
        (["--superlink", "127.0.0.1:1", "--insecure", "--auth-supernode-private-key", "{}/site-a.key"], "needs TLS"),
        (["--superlink", "127.0.0.1:1", "--insecure", "--connect-deadline", "-1"], "'-1'; allowed: 0 seconds and more"),
        (
            ["--superlink", "127.0.0.1:1", "--insecure", "--node-config", 'site="{}/site-a.yaml"'],
            "`trust` is kept by the worker alone; start this with --isolation process",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_started(
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["keys", "site", str(tmp_path / "site-a")]) == 0
    data = {"path": "rows.jsonl", "prompt": "p", "answer": "a"}
    trust = {"bundles": ["0" * 64]}
    (tmp_path / "site-a.yaml").write_text(yaml.safe_dump({"name": "site-a", "data": data, "trust": trust}))
    socket = ["--socket", str(tmp_path / "socket")]
    assert main(["site", "supernode", *socket, *(argument.format(tmp_path) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_app_refuses_to_work_unchecked_where_the_site_trusts_only_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.app import _session

    file = make_federation(tmp_path, {"site-a": 8})
    site = tmp_path / "site-a.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "trust": {"bundles": ["0" * 64]}}))
    agreement = make_agreement(resolved(load(file, FederationConfig), file))
    context = Context(1, 1, {"site": str(site)}, RecordDict(), {})
    monkeypatch.delenv("FEDSPAN_VETTED", raising=False)
    with pytest.raises(ConfigError, match="site-a: its site file has `trust`, but nobody has checked this bundle"):
        _session(load(site, SiteConfig), agreement, context)
    monkeypatch.setenv("FEDSPAN_VETTED", "1")
    assert _session(load(site, SiteConfig), agreement, context).site.name == "site-a"
