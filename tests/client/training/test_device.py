"""A site that asks for what its machine lacks is told so."""

import pytest
import torch

from client.training.settings import describe, pick_autocast, pick_device, pick_devices
from common.config.site import SiteConfig
from common.errors import TrainingError


def test_auto_takes_what_is_there() -> None:
    device = pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu").type == "cpu"


def test_missing_cuda_device_is_an_error() -> None:
    with pytest.raises(TrainingError, match="device cuda:99 is asked for; this machine has"):
        pick_device("cuda:99")


def test_precision_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert pick_autocast("auto", cpu) is None
    assert pick_autocast("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(TrainingError, match="float16 needs a CUDA device"):
        pick_autocast("float16", cpu)


def site(**keys: object) -> SiteConfig:
    return SiteConfig.model_validate({"name": "a", "data": {"path": "x", "prompt": "p", "answer": "a"}, **keys})


def cuda_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("keys", "there", "rows", "picked"),
    [
        ({}, 4, 8, ["cuda"]),
        ({"devices": "auto"}, 4, 8, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ({"devices": "auto"}, 4, 2, ["cuda:0", "cuda:1"]),
        ({"devices": "auto"}, 4, None, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ({"devices": "auto"}, 4, 1, ["cuda"]),
        ({"devices": "auto"}, 0, 8, ["cpu"]),
        ({"devices": "auto", "device": "cpu"}, 4, 8, ["cpu"]),
        ({"devices": 2}, 4, 8, ["cuda:0", "cuda:1"]),
        ({"devices": 3, "device": "cpu"}, 0, 8, ["cpu", "cpu", "cpu"]),
        ({"devices": "auto", "split": True}, 2, 1, ["cuda:0", "cuda:1"]),
        ({"devices": 2, "split": True}, 4, 1, ["cuda:0", "cuda:1"]),
        ({"devices": "auto", "split": True}, 0, 1, ["cpu"]),
    ],
)
def test_devices_of_a_site(
    keys: dict[str, object], there: int, rows: int | None, picked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_devices(monkeypatch, there)
    assert [str(device) for device in pick_devices(site(**keys), rows)] == picked


@pytest.mark.parametrize(
    ("keys", "there", "rows", "told"),
    [
        ({"devices": 3}, 2, 8, r"`devices` is 3; this machine has 2 CUDA device\(s\); allowed: 1 to 2, auto"),
        ({"devices": 2}, 0, 8, "`devices` is 2, but this machine has no CUDA device; allowed: `devices` 1 or auto"),
        ({"devices": 2, "split": True}, 0, 8, "this machine has no CUDA device; allowed: `devices` 1 or auto$"),
        ({"devices": 4}, 4, 3, r"steps have 3 row\(s\), so that a device would have none; allowed: `devices` 1 to 3"),
        ({"devices": 4, "device": "cpu"}, 0, 3, r"steps have 3 row\(s\)"),
    ],
)
def test_devices_that_cannot_be_had(
    keys: dict[str, object], there: int, rows: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_devices(monkeypatch, there)
    with pytest.raises(TrainingError, match=told):
        pick_devices(site(**keys), rows)


def test_one_device_and_several_is_a_mistake_in_the_file() -> None:
    with pytest.raises(ValueError, match="`device` cuda:1 is one device, `devices` 2 are several"):
        site(device="cuda:1", devices=2)
    with pytest.raises(ValueError, match="devices"):
        site(devices=0)


@pytest.mark.parametrize(
    "keys", [{}, {"devices": 1}, {"devices": 2, "device": "cpu"}, {"devices": "auto", "device": "cpu"}]
)
def test_split_over_one_device_or_a_cpu_is_a_mistake_in_the_file(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"`split` lays a model over several CUDA devices, but `device` is .*allowed"):
        site(split=True, **keys)


def test_devices_are_named_with_their_number() -> None:
    assert describe([torch.device("cpu")]) == "cpu"
    assert describe([torch.device("cpu")] * 2) == "2 x cpu"
    assert describe([torch.device("cpu")] * 2, "nf4", split=True) == "one model over 2 x cpu, base model in nf4"
