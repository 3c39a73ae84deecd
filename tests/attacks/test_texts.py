"""Texts of the other side that are meant for a terminal, a page or another site's place."""

from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error

from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError, DataError, WireError
from common.protocol.messages import Failure, Hello, State
from deploy.sandbox.tiny import make_federation
from tests.common.protocol.test_messages import HELLO, STATE

CLIPBOARD = "\x1b]52;c;cm0gLXJmIC8=\x07"  # lets many terminals overwrite the clipboard
SEQUENCES = [
    "\x1b[2J\x1b[31mround 9 done",
    CLIPBOARD,
    "a\nsite-b: joined",
    "a\rserver: all is well",
    "\x9b2J",
    "a\u202ebda",
]


@pytest.mark.parametrize("text", SEQUENCES)
def test_reason_is_one_line_that_commands_no_terminal(text: str) -> None:
    found = Failure.read(Error(DataError.code, f"shard {text} has no rows")).reason
    assert found.isprintable()
    assert found.startswith("shard ")
    assert found.endswith(" has no rows")


def test_sentence_of_an_honest_site_stays_as_it_is() -> None:
    text = "Einrichtung Süd: shard /daten/Ärzte.csv has no column 'ICD‑10'"
    assert Failure.read(Error(DataError.code, text)).reason == text


@pytest.mark.parametrize("text", SEQUENCES)
@pytest.mark.parametrize("key", ["device", "version"])
def test_hello_with_control_characters_is_refused(key: str, text: str) -> None:
    content = replace(HELLO).to_record()
    content["config"] = ConfigRecord({**dict(content["config"]), key: text})  # type: ignore[dict-item]
    with pytest.raises(WireError, match=rf"{key} is .*; allowed: text of 1 to 256 printable characters"):
        Hello.read(content)


def test_tensors_with_control_characters_in_their_names_are_not_asked_for() -> None:
    content = replace(STATE).to_record()
    content["config"] = ConfigRecord({**dict(content["config"]), "active": ["w\x1b[2J"]})  # type: ignore[dict-item]
    with pytest.raises(WireError, match="active is"):
        State.read(content)


def test_no_site_can_be_called_server(tmp_path: Path) -> None:
    content = replace(HELLO).to_record()
    content["config"] = ConfigRecord({**dict(content["config"]), "site": "server"})  # type: ignore[dict-item]
    with pytest.raises(WireError, match=r"site is .server.; allowed: .* but not server"):
        Hello.read(content)
    assert Hello.site_in(content) is None
    make_federation(tmp_path, {"site-a": 9, "site-b": 17})
    file = tmp_path / "site-a.yaml"
    file.write_text(file.read_text().replace("name: site-a", "name: server"))
    with pytest.raises(ConfigError, match="'server' is the server's name in records and pages"):
        load(file, SiteConfig)
