"""A server that asks what a site has not agreed to: one sentence, whatever it asks, and no file of rows is opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict

from client import app as site_app
from client.privacy.agreement import NOT_AGREED
from common.config.federation import FederationConfig, resolved, settings_for_sites
from common.config.load import load
from common.errors import PolicyError
from common.protocol.messages import Hello, HelloRequest
from deploy.sandbox.tiny import make_federation
from tests.harness.agreements import agree_all


class Site:
    """A site that has agreed to one federation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = agree_all(make_federation(folder, {"site-a": 9, "site-b": 9}))
        self.settings: dict[str, Any] = json.loads(
            settings_for_sites(resolved(load(self.file, FederationConfig), self.file))
        )

    def asked(self, settings: str) -> Message:
        """The answer to a hello."""
        site_app._sessions.clear()
        context = Context(1, 1, {"site": str(self.folder / "site-a.yaml")}, RecordDict(), {})
        content = RecordDict({"config": HelloRequest(federation=settings, signatures=None).to_record()["config"]})
        return site_app.app(Message(content, dst_node_id=1, message_type="query"), context)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def labels(settings: dict[str, Any]) -> None:
    """Of the operator's choice: a row with another label is an error, so its answer tells a row's label."""
    settings["task"] = {"type": "sequence-classification", "labels": ["acute pain of the hand", "x"]}
    settings["strategy"]["head"] = "train"


def key(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(settings: dict[str, Any]) -> None:
        for part in path[:-1]:
            settings = settings[part]
        settings[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        labels,
        key("rounds", value=10**6),
        key("training", "learning_rate", value=1e6),
        key("training", "batch_size", value=1),
        key("training", "max_length", value=8),
        key("strategy", "rank", value=1),
        key("evaluation", "max_examples", value=1),
        key("evaluation", "every", value=7),
        key("model", "path", value="/etc"),
        key("model", "dtype", value="float16"),
        key("model", value={"hub": "somebody/else", "revision": "0" * 40, "path": None, "dtype": "float32"}),
        key("name", value="another"),
        key("name", value="tiny\x1b]52;c;Zm9v\x07"),
        key("cohort", value={"min_clients": 1}),
        key("more", value=1),
        lambda settings: settings.clear(),
    ],
)
def test_other_settings_get_one_sentence_before_a_row_is_read(
    site: Site, change: Callable[[dict[str, Any]], None]
) -> None:
    (site.folder / "site-a.jsonl").unlink()  # whoever opened it would say so
    change(site.settings)
    error = site.asked(json.dumps(site.settings)).error
    assert (error.code, error.reason) == (PolicyError.code, f"site-a: {NOT_AGREED}")


@pytest.mark.parametrize("settings", ["[]", "{", "[" * 10**5, "NaN", '{"name": NaN}', '"tiny"', '{"name": {}}'])
def test_what_is_no_settings_gets_the_same_sentence(site: Site, settings: str) -> None:
    error = site.asked(settings).error
    assert (error.code, error.reason) == (PolicyError.code, f"site-a: {NOT_AGREED}")


def test_refused_questions_leave_a_short_line_each_in_the_ledger(site: Site) -> None:
    site.settings["name"] = "n" * 10**5
    before = len((site.folder / "site-a-ledger.jsonl").read_bytes()) if site.asked("{").has_error() else 0
    site.asked(json.dumps(site.settings))
    assert len((site.folder / "site-a-ledger.jsonl").read_bytes()) < before + 1000


def test_agreed_settings_are_answered_in_any_order_of_keys(site: Site) -> None:
    reply = site.asked(json.dumps(dict(reversed(site.settings.items()))))
    assert Hello.read(reply.content).site == "site-a"


def test_answer_does_not_depend_on_where_the_operator_keeps_the_model(site: Site, tmp_path: Path) -> None:
    assert str(tmp_path) not in json.dumps(site.settings)


def test_file_of_agreements_that_was_edited_agrees_to_nothing_else(site: Site) -> None:
    file = site.folder / "site-a-agreements.json"
    data = json.loads(file.read_text())
    data["federations"]["tiny"]["settings"]["rounds"] = 3
    file.write_text(json.dumps(data))
    assert site.asked(json.dumps(site.settings)).error.reason == f"site-a: {NOT_AGREED}"
    file.write_text("{}x")
    assert "no file that `fedspan site agree` wrote" in site.asked(json.dumps(site.settings)).error.reason


def test_model_that_only_the_server_names_is_not_opened(site: Site) -> None:
    """The agreement names the folder; without it and without `model` in the site file nothing is opened."""
    file = site.folder / "site-a-agreements.json"
    data = json.loads(file.read_text())
    data["federations"]["tiny"]["model"]["path"] = None
    file.write_text(json.dumps(data))
    assert "give `model` in the site file" in site.asked(json.dumps(site.settings)).error.reason
    own = site.folder / "site-a.yaml"
    own.write_text(yaml.safe_dump({**yaml.safe_load(own.read_text()), "model": "model"}))
    assert not site.asked(json.dumps(site.settings)).has_error()
