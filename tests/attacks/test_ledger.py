"""What a server can do to a site's ledger, and one site to another's."""

import json
from pathlib import Path

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from client.app import app
from client.privacy import guard
from client.privacy.ledger import Ledger
from client.privacy.ledger_summary import summary
from common.errors import LedgerError
from deploy.cli import main

FORGED = "no\n\nNothing has left this site.\n\x1b[8m\u202eDifferential privacy: 9 updates\r"


def site_file(folder: Path, name: str = "site-a", **changes: object) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text('{"q": "x", "a": "y"}\n')
    data = {"path": rows.name, "prompt": "q", "answer": "a"}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "data": data, **changes}))
    return file


def say_hello(file: Path, federation: str) -> str:
    """What the site answers to a server's first question."""
    guard._books.clear()
    content = RecordDict({"config": ConfigRecord({"federation": federation})})
    return app(
        Message(content, 2, MessageType.QUERY), Context(1, 2, {"site": str(file)}, RecordDict(), {})
    ).error.reason


@pytest.mark.parametrize(
    "federation",
    [
        "x" * 19_000_000,
        "x" * 1_000_000,
        json.dumps({f"{FORGED} {number}": number for number in range(8000)}),
        json.dumps({"name": FORGED * 10_000}),
    ],
)
def test_hello_of_megabytes_costs_the_ledger_a_line(tmp_path: Path, federation: str) -> None:
    file = site_file(tmp_path)
    reason = say_hello(file, federation)
    assert reason.startswith("site-a: ")
    assert reason.isprintable()
    assert len(reason.encode()) <= 1024
    ledger = tmp_path / "site-a-ledger.jsonl"
    assert ledger.stat().st_size < 4096
    lines = summary(ledger).splitlines()
    assert all(line.isprintable() and len(line) < 1200 for line in lines)
    assert [line for line in lines if line.startswith("Nothing has left")] == ["Nothing has left this site."]


def test_officer_is_shown_no_line_that_an_older_entry_forged(tmp_path: Path) -> None:
    """Entries are as they were written: what is shown of them is on one line all the same."""
    ledger = tmp_path / "ledger.jsonl"
    about = {"federation": FORGED, "run": FORGED, "strategy": "fedit", "bundle": FORGED, "rows": 9, "told": [FORGED]}
    sent = {"message": "evaluate", "out": {"bytes": 0, "tensors": {FORGED: []}}, "privacy": None}
    with Ledger(ledger).opened() as opened:
        opened.append({"event": "begun", "site": FORGED})
        opened.append({"event": "failed", "reason": FORGED * 1000})
        opened.append({"event": "sent", **about, **sent})
    lines = summary(ledger).splitlines()
    assert all(line.isprintable() and len(line) < 1200 for line in lines)
    assert not [line for line in lines if line.startswith(("Nothing has left", "Differential privacy: 9"))]


def test_site_writes_into_no_ledger_that_another_has_begun(tmp_path: Path) -> None:
    one, two = site_file(tmp_path), site_file(tmp_path, "site-b", ledger="site-a-ledger.jsonl")
    say_hello(one, "{}")
    ledger = tmp_path / "site-a-ledger.jsonl"
    before = ledger.read_bytes()
    assert f"{ledger}: it is the ledger of site-a; site-b needs one of its own" in say_hello(two, "{}")
    assert ledger.read_bytes() == before
    with pytest.raises(LedgerError, match="it is the ledger of site-a"), Ledger(ledger, site="site-b").opened():
        pass
    say_hello(one, "{}")
    assert len(ledger.read_bytes()) > len(before)


def test_site_with_anothers_ledger_does_not_join(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_hello(site_file(tmp_path), "{}")
    two = site_file(tmp_path, "site-b", ledger="site-a-ledger.jsonl")
    assert main(["site", "join", str(two), "--superlink", "127.0.0.1:1", "--insecure"]) == 1
    assert "site-a-ledger.jsonl is that of site-a; each site needs its own" in capsys.readouterr().err
    assert not (tmp_path / ".site-b").exists()
