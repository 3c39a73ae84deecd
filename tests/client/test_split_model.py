"""A site whose devices hold one model together trains, sends, scores and writes what a site with one device does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from client import app as site_app, site_model
from client.session import Session
from common.protocol.messages import DeliverReply
from common.protocol.tensors import Tensors
from tests.client.test_delivery import Asked
from tests.client.test_devices import CARRIED, SGD, STRATEGIES
from tests.client.test_session import classifier, session
from tests.harness.placed import CPU, several_devices

OTHER = torch.device("cpu", 1)
SPLIT = {"devices": 2, "split": True}
FEDFTG = STRATEGIES["fedftg"]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with two cards would pick, here devices that the tests make up."""
    pick = site_model.pick_devices
    monkeypatch.setattr(site_model, "pick_devices", lambda site, rows: [CPU, OTHER] if site.split else pick(site, rows))
    monkeypatch.setattr(site_model, "free_bytes", lambda devices: [10**9] * len(devices))


def rounds(own: Session, count: int) -> tuple[Tensors, dict[str, float], dict[str, float]]:
    """The last of so many updates, its numbers, and the scores afterwards."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in own.exchanged.items()}
    own.set_state(state, None, list(state))
    for number in range(1, count + 1):
        update, numbers = own.train(number, list(state))
    assert {tensor.device for tensor in update.values()} == {CPU}
    return update, numbers, own.evaluate()


def compare(make: Callable[[Path, dict[str, Any]], Session], tmp_path: Path, count: int = 1) -> None:
    """So many rounds of a split model equal those of an undivided one."""
    found = []
    for where, on in (({"device": "cpu"}, {CPU}), (SPLIT, {CPU, OTHER})):
        with several_devices():
            own = make(tmp_path / str(len(on)), where)
            found.append(rounds(own, count))
            assert {parameter.device for parameter in own.model.tuned.model.parameters()} == on
    (update, numbers, scores), (same, told, scored) = found
    assert same.keys() == update.keys()
    assert all(torch.allclose(same[name].float(), update[name].float(), rtol=0, atol=1e-6) for name in update)
    assert told["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    assert scored == pytest.approx(scores, abs=0.011)  # scores are rounded before they leave


def same(tmp_path: Path, site: dict[str, Any] | None = None, count: int = 1, **changes: Any) -> None:
    if changes["strategy"]["name"] == "fedsa-lora":  # whose model no server can judge
        changes["evaluation"] = {"server": None}
    compare(lambda folder, where: session(folder, {**where, **(site or {})}, **changes), tmp_path, count)


FEW = {**SGD, "local_steps": 2}


@pytest.mark.parametrize(
    "name", [name if name == "fedftg" else pytest.param(name, marks=pytest.mark.long) for name in STRATEGIES]
)
def test_split_model_trains_as_an_undivided_one(tmp_path: Path, name: str) -> None:
    same(tmp_path, strategy=STRATEGIES[name], training=FEW)


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["fedftg", "fedit"])
def test_split_model_in_codes_trains_as_an_undivided_one(tmp_path: Path, name: str, quantization: str) -> None:
    same(tmp_path, strategy=STRATEGIES[name], training=FEW, model={"path": "model", "quantization": quantization})


@pytest.mark.long
@pytest.mark.parametrize("name", ["fedftg", "fedit"])
def test_bfloat16_checkpoints_and_generated_answers(tmp_path: Path, name: str) -> None:
    changes = {"training": {**FEW, "gradient_checkpointing": True}, "evaluation": {"generate": 2}}
    same(tmp_path, {"precision": "bfloat16"}, strategy=STRATEGIES[name], **changes)


@pytest.mark.long
@pytest.mark.parametrize("carried", CARRIED)
def test_optimizer_state_is_carried_over_to_where_its_weight_is(tmp_path: Path, carried: str) -> None:
    same(tmp_path, count=2, strategy=CARRIED[carried])


@pytest.mark.long
def test_gradients_of_both_devices_are_clipped_together(tmp_path: Path) -> None:
    for name in ("fedftg", "fedit"):
        (folder := tmp_path / name).mkdir()
        same(folder, strategy=STRATEGIES[name], training={**FEW, "max_grad_norm": 0.01})


@pytest.mark.long
@pytest.mark.parametrize("head", ["train", "local"])
def test_split_classifier_trains_as_an_undivided_one(tmp_path: Path, head: str) -> None:
    def make(folder: Path, where: dict[str, Any]) -> Session:
        folder.mkdir()
        own = classifier(folder, FEW, head=head)
        own.site = own.model._site = own.site.model_copy(update=where)
        return own

    compare(make, tmp_path)


@pytest.mark.parametrize(
    "strategy",
    [
        FEDFTG,
        pytest.param({**STRATEGIES["fedit"], "merge": True}, marks=pytest.mark.long),
        pytest.param(STRATEGIES["fedit"], marks=pytest.mark.long),
    ],
    ids=["fedftg", "merged", "fedit"],
)
def test_model_that_is_written_is_that_of_an_undivided_one(tmp_path: Path, strategy: dict[str, Any]) -> None:
    written = []
    for where in ({"device": "cpu"}, SPLIT):
        site_app._sessions.clear()
        (folder := tmp_path / str(len(where))).mkdir()
        with several_devices():
            asked = Asked(folder, strategy)
            file = folder / "site-a.yaml"
            file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **where}))
            told = DeliverReply.read(asked.ask(asked.state).content)
        assert told.reason is None
        written.append({path.name: path.read_bytes() for path in (asked.models / "tiny" / "model").iterdir()})
    site_app._sessions.clear()
    whole, split = written
    assert any(name.endswith(".safetensors") for name in whole)
    assert split == whole


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["fedftg", "fedftg, shared", "fedit"])
def test_split_over_two_cuda_devices(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = []
    for where in ({"device": "cuda"}, {"device": "cuda", **SPLIT}):
        own = session(
            tmp_path / str(len(where)), {**where, "precision": "float32"}, strategy=STRATEGIES[name], training=FEW
        )
        found.append(rounds(own, 2))
    assert {parameter.device.index for parameter in own.model.tuned.model.parameters()} == {0, 1}
    (update, numbers, _), (other, told, _) = found
    assert all(torch.allclose(other[key].float(), update[key].float(), rtol=0, atol=1e-5) for key in update)
    assert told["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    assert told["peak_memory_bytes"] > 0
