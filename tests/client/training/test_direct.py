"""R straight from a layer's input is the gradient's projection, wherever else the weight is used."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from client.training.direct import layers_of
from client.training.galore import GaLore


class Twice(nn.Module):
    """Layers of both kinds of shape; the first is called twice, and its weight multiplied with once more."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.high = nn.Linear(9, 6, bias=True), nn.Linear(6, 9)

    def forward(self, inputs: Tensor) -> Tensor:
        again = self.wide(torch.tanh(self.high(torch.tanh(self.wide(inputs)))))
        loss: Tensor = again.square().sum() + functional.linear(inputs, self.wide.weight).pow(3).sum()
        return loss


def bases(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """P of both weights: (6, 2) for (6, 9), and (2, 6) for (9, 6)."""
    drawn = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(1))
    return {"wide": drawn[0].to(dtype), "high": drawn[1].T.contiguous().to(dtype)}


def made(direct: bool) -> tuple[Twice, GaLore]:
    torch.manual_seed(0)
    model = Twice()
    weights: dict[str, Any] = {"wide": model.wide.weight, "high": model.high.weight}
    options: dict[str, Any] = {"lr": 0.1, "rank": 2, "update_proj_gap": 9, "scale": 1.0, "inner": "sgd"}
    galore = GaLore(weights, **options, basis=lambda name, _: bases()[name])
    if direct:
        galore.layers = layers_of(model, set(weights.values()))
        assert galore.layers == [model.wide, model.high]
    return model, galore


def step(model: Twice, galore: GaLore, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Backward passes of one step: the projected gradients."""
    with galore.projecting():
        for part in inputs:
            model(part).backward()
    return {n: galore.state[getattr(model, n).weight]["low"].clone() for n in ("wide", "high")}


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 4, 9, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("parts", [1, 3])
def test_projected_gradient_is_that_of_the_whole_one(parts: int) -> None:
    model, galore = made(direct=True)
    step(model, galore, inputs(1))  # the first step makes the bases
    galore.step()
    model.zero_grad()
    found = step(model, galore, inputs(parts))
    assert "forward" not in vars(model.wide)
    exact = Twice().double()
    exact.load_state_dict(model.state_dict())
    for part in inputs(parts):
        exact(part.double()).backward()
    for name, basis in bases(torch.float64).items():
        whole = getattr(exact, name).weight.grad
        wanted = whole @ basis.T if name == "high" else basis.T @ whole
        assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-6
        other = getattr(exact, name).bias.grad
        assert float((getattr(model, name).bias.grad - other).norm() / other.norm()) < 1e-6


def test_no_whole_gradient_is_made_where_the_basis_stays() -> None:
    made_whole: list[bool] = []
    for direct in (False, True):
        model, galore = made(direct)
        hook = model.high.weight.register_hook(lambda gradient: made_whole.append(gradient is not None))
        for _ in range(3):
            step(model, galore, inputs(1))
            galore.step()
        hook.remove()
        assert made_whole == [True, not direct, not direct]
        made_whole.clear()


def test_layers_of_another_kind_or_format_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(other := Other(2, 2), half := nn.Linear(2, 2).bfloat16(), free := nn.Linear(2, 2))
    assert layers_of(model, {other.weight, half.weight}) == []
    assert layers_of(model, {other.weight, half.weight, free.weight}) == [free]
