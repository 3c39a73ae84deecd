"""GaLore's state between two rounds: what goes on, and what is sent."""

from typing import Literal

import pytest
import torch
from torch import nn

from client.training.between_rounds import capture, restore
from client.training.galore import GaLore
from client.training.settings import make_optimizer
from common.config.strategy import FedFTGConfig, RoLoRAConfig
from common.config.training import TrainingConfig
from strategies.admission.bounds import largest_change
from tests.client.training.test_galore import galore, gradients, run, weight

TRAINING = TrainingConfig(learning_rate=0.02, local_steps=3, max_grad_norm=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "gap", "steps"), [((12, 7), 4, 3), ((7, 12), 3, 3), ((9, 9), 9, 3), ((12, 7), 2, 5)])
def test_rounds_that_go_on_are_one_long_run(shape: tuple[int, int], gap: int, steps: int, dtype: torch.dtype) -> None:
    """Bit for bit; and no round has more bases than the federation counts with."""
    grads = gradients(shape, 3 * steps)
    straight, stepwise = weight(shape, dtype), weight(shape, dtype)
    whole = galore(straight, update_proj_gap=gap)
    run(straight, whole, grads)
    kept: dict[str, torch.Tensor] = {}
    most = FedFTGConfig(optimizer_state="keep", update_proj_gap=gap).bases(steps)
    for number in range(3):
        optimizer, start = galore(stepwise, update_proj_gap=gap), stepwise.detach().clone()
        restore(optimizer, {"w": stepwise}, kept)
        run(stepwise, optimizer, grads[number * steps : (number + 1) * steps])
        factors = optimizer.factors("w")
        assert len(factors.terms) <= most
        torch.testing.assert_close(factors.apply(start).to(dtype), stepwise.detach(), rtol=1e-5, atol=1e-6)
        kept = capture(optimizer, {"w": stepwise})
    if dtype == torch.float32:  # a bfloat16 weight is rounded at the end of a round
        assert torch.equal(straight, stepwise)


@pytest.mark.parametrize("keep", ["reset", "keep"])
def test_without_projection_the_weights_go_as_adamw_takes_them(keep: Literal["reset", "keep"]) -> None:
    """Two rounds against torch's AdamW in float64, with the gradient's norm clipped."""
    strategy = FedFTGConfig(projection="none", optimizer_state=keep)
    mine, theirs = weight((12, 7)), nn.Parameter(weight((12, 7)).detach().double())
    peer = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.0)
    kept: dict[str, torch.Tensor] = {}
    for number in (1, 2):
        start = mine.detach().clone()
        optimizer = make_optimizer({"w": mine}, TRAINING, strategy, number, None, None)
        if keep == "keep":
            restore(optimizer, {"w": mine}, kept)
        else:
            peer = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.0)
        for gradient in gradients((12, 7), 3, seed=number):
            theirs.grad = gradient.double()
            nn.utils.clip_grad_norm_([theirs], 0.5)
            peer.step()
        run(mine, optimizer, gradients((12, 7), 3, seed=number))
        kept = capture(optimizer, {"w": mine})
        assert isinstance(optimizer, GaLore)
        assert not optimizer.projected
        torch.testing.assert_close(optimizer.whole("w", start).double(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "head"),
    [(FedFTGConfig(rank=2), "score.weight"), (RoLoRAConfig(), "base_model.model.classifier.weight")],
)
def test_head_has_a_rate_of_its_own(strategy: FedFTGConfig | RoLoRAConfig, head: str) -> None:
    """Adam's first step is as long as its rate, whatever the gradient."""
    parameters = {"w": weight((12, 7)), head: weight((3, 5))}
    before = parameters[head].detach().clone()
    training = TRAINING.model_copy(update={"head_learning_rate": 0.3})
    optimizer = make_optimizer(parameters, training, strategy, 1, None, None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.3]
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameters[head].detach(), before - 0.3)
    others = largest_change("w", before, 1, training, strategy)
    assert (
        largest_change(head, before, 1, training, strategy) >= (1 if strategy.trains == "lora" else 4) * 14.9 * others
    )
