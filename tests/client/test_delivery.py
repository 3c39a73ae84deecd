"""A site that is to write a model: it writes only what it was told the digest of, and only where there is room."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ArrayRecord, Context, Message, RecordDict

from client import app as site_app
from common.config.federation import FederationConfig, resolved, settings_for_sites
from common.config.load import load
from common.errors import PolicyError, StaleStateError, WireError
from common.model.finished import About
from common.protocol import wire
from common.protocol.messages import DeliverReply, DeliverRequest, HelloRequest
from deploy.sandbox.tiny import make_federation
from server.loop.delivery import DELIVER
from server.loop.server_model import ServerModel
from server.run.outcome import Outcome
from strategies.rule import Tensors
from tests.harness.agreements import agree_all


class Asked:
    """A site that holds nothing yet, and a server's request for the model of ``state``."""

    def __init__(self, folder: Path, strategy: dict[str, Any]) -> None:
        file = make_federation(folder, {"site-a": 9}, strategy=strategy)
        site = folder / "site-a.yaml"
        site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "keep": {"model": "models"}}))
        agree_all(file)
        config = resolved(load(file, FederationConfig), file)
        self.models = folder / "models"
        self.settings = HelloRequest(federation=settings_for_sites(config), signatures=None, run="one")
        server = ServerModel(config, file)
        self.state = {name: tensor + 1e-4 for name, tensor in server.initial_state().items()}
        self.about = About(use=server.use, card=server.card(self.state, Outcome(1, sites=1))).model_dump_json()
        self._context = Context(1, 1, {"site": str(site)}, RecordDict(), {})

    def ask(self, tensors: Tensors | None = None, **changes: Any) -> Message:
        arrays = ArrayRecord() if tensors is None else wire.encode(tensors, bundled=True)
        fields = {
            **vars(self.settings),
            "server_round": 1,
            "active": [],
            "arrays": arrays,
            "about": self.about,
            **changes,
        }
        content = DeliverRequest(**fields).to_record()
        message = Message(content, 1, DELIVER, group_id="1")
        message.metadata.__dict__["_message_id"] = "1"
        return site_app.app(message, self._context)


LORA = {"name": "fedit", "modules": "linear", "rank": 2}


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    site_app._sessions.clear()
    return Asked(tmp_path, LORA)


@pytest.mark.parametrize("strategy", [LORA, {"name": "fedftg", "rank": 2}], ids=["fedit", "fedftg"])
def test_site_writes_what_it_is_sent_if_the_digest_says_so(tmp_path: Path, strategy: dict[str, Any]) -> None:
    site_app._sessions.clear()
    asked = Asked(tmp_path, strategy)
    assert asked.ask().error.code == StaleStateError.code
    other = {name: tensor + 1e-4 for name, tensor in asked.state.items()}
    assert asked.ask(other).error.code == StaleStateError.code
    assert not asked.models.exists()
    told = DeliverReply.read(asked.ask(asked.state).content)
    assert told.reason is None
    assert list((asked.models / "tiny" / "model").glob("*model.safetensors"))
    assert DeliverReply.read(asked.ask().content).files == told.files  # it is there already


@pytest.mark.parametrize("about", ["{}", "[" * 9000, '{"use": 1, "card": {}}', "x" * 70_000])
def test_facts_that_are_none_are_refused(asked: Asked, about: str) -> None:
    assert asked.ask(asked.state, about=about).error.code == WireError.code
    assert not asked.models.exists()


def test_state_that_training_cannot_have_made_is_refused(asked: Asked) -> None:
    far = {name: tensor + 100.0 for name, tensor in asked.state.items()}
    assert asked.ask(far).error.code == WireError.code


def test_settings_that_were_not_agreed_to_deliver_nothing(asked: Asked) -> None:
    settings = asked.settings.federation.replace('"rounds": 2', '"rounds": 3')
    assert asked.ask(asked.state, federation=settings).error.code == PolicyError.code
    assert not asked.models.exists()


def test_full_disk_is_a_reason_and_leaves_no_half_folder(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        told = DeliverReply.read(asked.ask(asked.state).content)
    assert told.files is None
    assert told.reason is not None
    assert "no room: it takes" in told.reason
    assert not (asked.models / "tiny" / "model").exists()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("common.model.export.save_file", full)
        told = DeliverReply.read(asked.ask(asked.state).content)
    assert told.reason == "the model cannot be written (No space left on device)"
    assert sorted(path.name for path in (asked.models / "tiny").iterdir()) == ["delivered.json"]
    assert DeliverReply.read(asked.ask(asked.state).content).files is not None
