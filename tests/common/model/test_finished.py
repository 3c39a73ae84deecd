"""The folder of a finished model: what is written beside the weights, and what is read of it."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.errors import ModelError
from common.model.card import Card, Licence, render
from common.model.finished import FACTS, digests, licence_of, read_finished, source_folder
from common.protocol.digest import tensors_digest
from deploy.sandbox.tiny import make_federation
from server.loop.server_model import ServerModel
from server.run.outcome import Outcome
from tests.harness.results import weights

LORA = {"name": "fedit", "rank": 2, "merge": True}


def exported(folder: Path, **changes: Any) -> tuple[Path, Card]:
    """The run folder with the result of a federation that has trained nothing yet, and the card."""
    file = make_federation(folder, {"site-a": 4}, **changes)
    (folder / "model" / "LICENSE").write_text("Do as you like.\n")
    (folder / "model" / "README.md").write_text("---\nlicense: Apache-2.0\n---\n# Tiny\n")
    server_model = ServerModel(resolved(load(file, FederationConfig), file), file)
    state = server_model.initial_state()
    card = server_model.card(state, Outcome(2, sites=3))
    server_model.export(state, folder / "run" / "model", card)
    return folder / "run", card


def test_folder_says_how_to_use_the_model_and_which_it_is(tmp_path: Path) -> None:
    run, card = exported(tmp_path)
    folder = run / "model"
    finished = read_finished(folder)
    assert finished.card == card
    assert finished.use.model_dump(exclude_none=True) == {
        "seed": 0,
        "max_length": 64,
        "max_new_tokens": 4,
        "batch_size": 16,
        "prompt": "term",
        "answer": "title",
    }
    assert finished.files == digests(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= finished.files.keys()
    assert (folder / "LICENSE").read_text() == "Do as you like.\n"
    assert (folder / "README.md").read_text() == render(card)
    assert (card.base.name, card.base.licence, card.form) == ("model", Licence(id="apache-2.0"), "model")
    trained = {name: tensor for name, tensor in weights(run).items() if ".mlp." in name and name[13] in "01"}
    assert trained
    assert card.trained_digest == tensors_digest(trained)


def test_folder_of_an_adapter_and_of_what_it_is_merged_into(tmp_path: Path) -> None:
    run, card = exported(tmp_path, strategy=LORA)
    assert card.trained_digest == tensors_digest(weights(run))
    assert read_finished(run / "model").card.form == "adapter"
    assert "library_name: peft" in (run / "model" / "README.md").read_text()  # ours, not PEFT's
    assert read_finished(run / "merged").card.form == "model"
    assert "library_name: transformers" in (run / "merged" / "README.md").read_text()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_files_are_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    os.umask(umask)
    run, _ = exported(tmp_path)
    for path in (run / "model").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
    assert stat.S_IMODE((run / "model").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    ("readme", "licence", "found"),
    [
        ("---\nlicense: mit\n---\n", None, Licence(id="mit")),
        (
            "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://e.org\n---\n",
            "COPYING",
            Licence(id="other", name="gemma", link="https://e.org"),
        ),
        (None, "apache", Licence(id="apache-2.0")),
        (None, "mit", Licence(id="mit")),
        (None, "LICENCE.txt", Licence(id="other", name="licence.txt", link="LICENCE.txt")),
        ("---\nlicense: [mit, gpl]\n---\n", None, Licence()),
        ("---\nlicense: free beer\n---\n", "LICENSE", Licence(id="other", name="license", link="LICENSE")),
        ("---\nlicense: other\nlicense_name: {a: b}\n---\n", None, Licence()),
        ("# license: mit\n", None, Licence()),
        ("---\nlicense: !!python/object:os.system x\n---\n", None, Licence()),
        (None, None, Licence()),
    ],
)
def test_licence_of_a_base_model(tmp_path: Path, readme: str | None, licence: str | None, found: Licence) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    if licence is not None:
        texts = {"apache": "\n      Apache License\n    Version 2.0, January 2004\n", "mit": "MIT License\n\nCopyright"}
        (tmp_path / ("LICENSE" if licence in texts else licence)).write_text(texts.get(licence, "Modified MIT License"))
    assert licence_of(tmp_path) == found


def test_hub_model_that_is_not_here_has_no_folder_and_no_known_licence() -> None:
    assert source_folder("nobody/nothing", "0" * 40) is None
    assert licence_of(None) == Licence()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda facts: facts | {"format": 2}, "`format`"),
        (lambda facts: facts | {"more": 1}, "unknown key `more`"),
        (lambda facts: facts | {"files": {"../x": "0" * 64}}, "`files"),
        (lambda facts: facts | {"use": facts["use"] | {"max_length": 0}}, "`use.max_length` is 0"),
        (lambda facts: [facts], "must be a section with the keys"),
    ],
)
def test_facts_are_read_strictly(tmp_path: Path, change: Any, told: str) -> None:
    run, _ = exported(tmp_path)
    file = run / "model" / FACTS
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ModelError, match=told) as raised:
        read_finished(run / "model")
    assert str(file) in str(raised.value)


def test_what_is_no_finished_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_finished(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"holds no fedspan\.json"):
        read_finished(tmp_path)
    for content in ("{", "[" * 100_000, "a" * 2**21):
        (tmp_path / FACTS).write_text(content)
        with pytest.raises(ModelError, match=r"fedspan\.json"):
            read_finished(tmp_path)
