"""The toy trains as ten separate clients would, and every strategy's curve is the recorded one.

``python -m tests.benchmarks.test_toy`` records the curves anew, when a change of the numbers is meant.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.toy import (
    BATCH,
    EPOCHS,
    METHODS,
    A,
    B,
    Images,
    accuracy,
    batches,
    federate,
    forward,
    split,
    start,
    train,
)

RECORDED = Path(__file__).parent / "recorded" / "toy.json"
ROUNDS, RATE = 5, 0.02


def images() -> Images:
    """Ten clients with 70 noisy copies of one pattern each; the last batch is smaller."""
    generator = torch.Generator().manual_seed(0)
    patterns = (torch.rand(10, 1, 784, generator=generator) > 0.8).float()
    pixels = patterns * torch.rand(10, 70, 784, generator=generator)
    return Images(pixels, torch.arange(10)[:, None].expand(10, 70))


def curve(method: str) -> list[float]:
    """Cross-entropy on all clients' images after every round."""
    data = images()
    rule, own = METHODS[method][0](), data.pooled() if method == "centralised" else data
    state, out = start(0)
    losses = []
    for reached in federate(rule, RATE, own, state, out, ROUNDS, seed=0):
        logits = forward(data, reached, out).reshape(-1, 10)
        losses.append(float(functional.cross_entropy(logits, data.digits.reshape(-1))))
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_curve_is_the_recorded_one(method: str) -> None:
    assert curve(method) == pytest.approx(json.loads(RECORDED.read_text())[method], rel=1e-3)


def test_methods_differ_and_learn() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == METHODS.keys()
    assert len({tuple(losses) for losses in recorded.values()}) == len(METHODS)
    assert recorded["FFA-LoRA"][0] == recorded["RoLoRA"][0]  # both train B alone in the first round


@pytest.mark.parametrize("learnt", [0.0, 1.0])
@pytest.mark.parametrize("active", [[A], [B], [A, B]])
def test_clients_train_as_if_each_were_alone(active: list[str], learnt: float) -> None:
    """In float64: in float32 a ReLU within rounding of zero is on or off as the processor's order of sums has it."""
    torch.manual_seed(0)
    frozen = learnt * nn.Linear(784, 784, dtype=torch.float64).weight.detach()
    data = Images(images().pixels.double(), images().digits)
    if learnt:
        data = replace(data, known=data.pixels @ frozen.T)
    state, out = start(1)
    state, out = {name: tensor.double() for name, tensor in state.items()}, out.double()
    stacked = {name: tensor.expand(10, *tensor.shape) for name, tensor in state.items()}
    together = train(stacked, active, 0.05, data, out, batches(70, torch.Generator().manual_seed(3)))
    for client in (0, 7):
        down, up = (nn.Linear(*shape, bias=False, dtype=torch.float64) for shape in ((784, 16), (16, 784)))
        layers = {A: down, B: up}
        for name, layer in layers.items():
            layer.weight.data.copy_(state[name])
        sgd = torch.optim.SGD([layers[name].weight for name in active], lr=0.05)
        order = torch.Generator().manual_seed(3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(70, generator=order).split(BATCH):
                sgd.zero_grad()
                pixels = data.pixels[client, rows]
                logits = torch.relu(pixels @ frozen.T + up(down(pixels))) @ out
                functional.cross_entropy(logits, data.digits[client, rows]).backward()
                sgd.step()
        assert together.keys() == set(active)
        for name in active:
            alone = layers[name].weight.detach()
            off, change = torch.linalg.norm(together[name][client] - alone), torch.linalg.norm(alone - state[name])
            assert float(off) < 1e-12 * float(change)


def test_parts_share_no_image_and_every_client_has_one_digit() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = split([torch.rand(30 + digit, 784, generator=generator) for digit in range(10)], 20, 5)
    assert [tuple(part.digits.shape) for part in parts] == [(10, 20), (10, 5), (10, 5)]
    rows = torch.cat([part.pixels.reshape(-1, 784) for part in parts])
    assert len(torch.unique(rows, dim=0)) == 300
    assert all(torch.equal(part.digits[:, 0], torch.arange(10)) for part in parts)


def test_state_that_is_not_finite_has_no_accuracy() -> None:
    state, out = start(0)
    assert accuracy({**state, A: state[A] * torch.nan}, out, images()) == 0.0


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps({method: curve(method) for method in METHODS}, indent=1) + "\n", encoding="utf-8")
