"""A site that asks for what its machine lacks is told so."""

import pytest
import torch

from client.training.settings import pick_autocast, pick_device
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
