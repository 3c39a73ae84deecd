"""The register of sites is a file that several may edit, and that a hello is held against."""

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.errors import FederationError
from deploy.cli import main
from server.superlink.registry import read
from tests.harness.fake_sites import Site, run
from tests.harness.processes import FEDSPAN
from tests.harness.programs import needs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for site in ("site-a", "site-b", "site-c"):
        assert main(["keys", "site", str(tmp_path / site)]) == 0
    return tmp_path / "register.json"


def add(file: Path, name: str, *options: str, key: str = "") -> int:
    return main(["sites", "add", str(file), name, str(file.parent / f"{key or name}.pub"), *options])


def states(file: Path) -> list[tuple[str, str]]:
    return [(site.name, site.state(datetime.now(UTC))) for site in read(file).sites]


@needs("ssh-keygen")
def test_sites_are_added_revoked_and_listed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(file, "site-a") == add(file, "site-b", "--expires", "2999-12-31") == 0
    assert main(["sites", "revoke", str(file), "site-a"]) == 0
    assert add(file, "site-a", key="site-c") == 0  # the site has made a new pair
    assert states(file) == [("site-a", "revoked"), ("site-b", "active"), ("site-a", "active")]
    assert len(read(file).active(datetime.now(UTC))) == 2
    capsys.readouterr()
    assert main(["sites", "list", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    marks = [
        subprocess.run(
            ["ssh-keygen", "-lf", str(file.parent / f"{site}.pub")], capture_output=True, text=True, check=True
        ).stdout.split()[1]
        for site in ("site-a", "site-b", "site-c")
    ]
    assert [line.split()[:3] for line in said] == [
        ["site-a", "revoked", marks[0]],
        ["site-b", "active", marks[1]],
        ["site-a", "active", marks[2]],
    ]
    assert said[1].endswith("until 2999-12-31")


def test_key_expires_at_the_end_of_its_last_day_and_may_be_prolonged(file: Path) -> None:
    today = datetime.now(UTC).date()
    assert add(file, "site-a", "--expires", str(today + timedelta(1))) == 0
    (site,) = read(file).sites
    last = datetime.combine(today + timedelta(1), datetime.max.time(), UTC)
    assert site.state(last) == "active"
    assert site.state(last + timedelta(seconds=1)) == "expired"
    assert add(file, "site-a", "--expires", "2999-12-31") == 0
    (longer,) = read(file).sites
    assert longer.registered == site.registered
    assert longer.state(last + timedelta(seconds=1)) == "active"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "site-b", "{}/site-a.pub"], "this key is that of site-a"),
        (["add", "site-a", "{}/site-b.pub"], "site-a has the key SHA256:"),
        (["add", "gone", "{}/site-c.pub"], "this key was revoked"),
        (["add", "x", "{}/site-b.key"], "this is a private key, which stays where it was made"),
        (["add", "x", "{}/none.pub"], "none.pub: cannot be read"),
        (["add", "two words", "{}/site-b.pub"], "`name` is 'two words'"),
        (["add", "x", "{}/site-b.pub", "--expires", "2020-01-01"], "--expires 2020-01-01: is in the past"),
        (["revoke", "site-x"], "site-x is not registered; registered: site-a"),
    ],
)
def test_mistakes_change_nothing(
    file: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(file, "site-a")
    add(file, "gone", key="site-c")
    main(["sites", "revoke", str(file), "gone"])
    before = file.read_bytes()
    capsys.readouterr()
    assert main(["sites", arguments[0], str(file), *(argument.format(file.parent) for argument in arguments[1:])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sites": [{"name": "x"}]}', '{"sites": [], "more": 1}'])
def test_damaged_register_is_named(file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(text)
    assert main(["sites", "list", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_editors_at_the_same_time_lose_nothing(file: Path) -> None:
    command = [*FEDSPAN, "sites", "add", str(file)]
    names = ["site-a", "site-b", "site-c"]
    editors = [subprocess.Popen([*command, name, str(file.parent / f"{name}.pub")]) for name in names]
    assert [editor.wait(120) for editor in editors] == [0, 0, 0]
    assert sorted(states(file)) == [(name, "active") for name in names]


def nodes(run_dir: Path, whose: dict[str, str]) -> None:
    run_dir.mkdir()
    (run_dir / "nodes.json").write_text(json.dumps({node: {"site": site} for node, site in whose.items()}))


def events(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]


def test_site_under_anothers_name_is_refused_and_the_others_train(tmp_path: Path) -> None:
    nodes(tmp_path / "run", {"1": "site-1", "2": "site-b", "4": "site-4"})
    run(tmp_path, [Site(1), Site(2), Site(3), Site(4)], 1, cohort={"min_clients": 2})
    refused = {e["client"]: e["reason"] for e in events(tmp_path) if e["event"] == "client_refused"}
    assert refused == {
        "site-2": "site-2: node 2 says that it is site-2, but its key is registered as site-b",
        "site-3": "site-3: node 3 says that it is site-3, but its key is not in the register of sites",
    }
    joined = {e["client"] for e in events(tmp_path) if e["event"] == "client_joined"}
    assert joined == {"site-1", "site-4"}


def test_run_without_enough_true_sites_names_the_false_one(tmp_path: Path) -> None:
    nodes(tmp_path / "run", {"1": "site-1", "2": "site-1"})
    with pytest.raises(FederationError, match="says that it is site-2, but its key is registered as site-1"):
        run(tmp_path, [Site(1), Site(2)], 1, cohort={"min_clients": 2, "join_deadline": 0.5})
