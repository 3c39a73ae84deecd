"""Adam's moments in 8 bits."""

import io
import sys

import pytest
import torch
from torch import nn

from client.training.galore import GaLore
from common.errors import TrainingError
from tests.client.training.test_galore import galore, gradients, run, weight


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_8bit_moments_take_a_quarter_and_train_alike(shape: tuple[int, int]) -> None:
    grads = gradients(shape, 8)
    states, results = [], []
    for moments in ("float32", "8bit"):
        parameter = weight(shape)
        optimizer = galore(parameter, rank=16, moments=moments)
        run(parameter, optimizer, grads)
        state = optimizer.state[parameter]
        states.append(sum(t.nbytes for k, t in state.items() if k.startswith("exp_avg")))
        results.append(parameter.detach())
    assert states[0] / states[1] > 3.9
    start = weight(shape).detach()
    assert float((results[1] - results[0]).norm() / (results[0] - start).norm()) < 0.05


def test_8bit_moments_of_small_unprojected_tensors() -> None:
    bias, other = nn.Parameter(torch.zeros(3)), weight((96, 64))
    optimizer = GaLore(
        {"w": other, "b": bias}, lr=0.1, rank=2, update_proj_gap=9, scale=1.0, moments="8bit", unprojected=["b"]
    )
    for _ in range(4):
        bias.grad, other.grad = torch.ones(3), torch.ones(96, 64)
        optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), -0.4), rtol=0.05, atol=0.0)


def test_8bit_moments_survive_saving() -> None:
    grads, straight, first = gradients((96, 64), 7), weight((96, 64)), weight((96, 64))
    run(straight, galore(straight, moments="8bit"), grads)
    optimizer = galore(first, moments="8bit")
    run(first, optimizer, grads[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    continued = galore(first, moments="8bit")
    continued.load_state_dict(torch.load(file, weights_only=True))
    run(first, continued, grads[4:])
    assert torch.equal(first, straight)


def test_8bit_moments_without_bitsandbytes_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match=r"strategy.moments is 8bit, which needs bitsandbytes at this site"):
        galore(weight((12, 7)), moments="8bit")
