"""GaLore while a model's backward pass goes on: projection at once, refreshes, memory that runs out, clipping."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from client.training.galore import GaLore
from common.linalg.subspace import SharedBasis
from tests.client.training.test_galore import galore, gradients, run, weight


class Two(nn.Module):
    """Two matrices in a row, one projected on each side."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.up = nn.Parameter(torch.randn(14, 9, generator=g))
        self.down = nn.Parameter(torch.randn(9, 14, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.T) @ self.down.T


def train_two(*, early: bool, micro: int, **options: object) -> tuple[Two, GaLore, list[bool]]:
    """Six steps over 8 rows; ``early``: project during backward. Also: whether any gradient was kept, by step."""
    model = Two()
    base: dict[str, object] = {"lr": 0.02, "rank": 3, "update_proj_gap": 3, "scale": 0.7, "weight_decay": 0.1}
    optimizer = GaLore(dict(model.named_parameters()), **{**base, **options})  # type: ignore[arg-type]
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(5))
    kept = []
    for _ in range(6):
        optimizer.zero_grad()
        for i in range(0, 8, micro):
            optimizer.last_backward = i + micro >= 8
            with optimizer.projecting() if early else contextlib.nullcontext():
                (model(x[i : i + micro]).square().sum() / 8).backward()
        kept.append(any(p.grad is not None for p in model.parameters()))
        optimizer.step()
    return model, optimizer, kept


@pytest.mark.parametrize("micro", [8, 3, 1])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"inner": "sgd"}])
def test_projecting_during_backward_changes_nothing_but_memory(micro: int, options: dict[str, object]) -> None:
    early, _, kept = train_two(early=True, micro=micro, **options)
    late, _, _ = train_two(early=False, micro=micro, **options)
    assert not any(kept)
    for a, b in zip(early.parameters(), late.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_wait_only_for_the_other_passes_of_a_refreshs_step() -> None:
    model = Two()
    optimizer = GaLore(dict(model.named_parameters()), lr=0.02, rank=3, update_proj_gap=3, scale=0.7)
    waiting = []
    for _ in range(4):
        for last in (False, True):
            optimizer.last_backward = last
            with optimizer.projecting():
                model(torch.ones(2, 9)).sum().backward()
            waiting.append(all(p.grad is not None for p in model.parameters()))
        optimizer.step()
    assert waiting == [True, False, False, False, False, False, True, False]


@pytest.mark.parametrize(("name", "dtype"), [("zeros", torch.float32), ("Tensor.clone", torch.bfloat16)])
def test_step_that_runs_out_of_memory_at_a_refresh_can_be_made_anew(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    grads, straight, parameter = gradients((12, 7), 6), weight((12, 7), dtype), weight((12, 7), dtype)
    run(straight, galore(straight), grads)
    optimizer = galore(parameter)
    with monkeypatch.context() as patch:
        patch.setattr(f"torch.{name}", fail)
        with pytest.raises(torch.OutOfMemoryError):
            run(parameter, optimizer, grads[:1])
    optimizer.zero_grad()
    run(parameter, optimizer, grads)
    assert torch.equal(straight, parameter)


def test_unprojected_tensor_that_found_no_memory_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    params = {"w": weight((12, 7)), "head": weight((3, 5))}
    optimizer = GaLore(params, lr=0.1, rank=2, update_proj_gap=9, scale=1.0, inner="sgd", unprojected=["head"])
    start, params["head"].grad = params["head"].detach().clone(), torch.ones(3, 5)
    with monkeypatch.context() as patch:
        patch.setattr("torch.zeros_like", fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    params["head"].grad = torch.ones(3, 5)
    optimizer.step()
    torch.testing.assert_close(params["head"].detach(), start - 0.1)


def test_norm_of_all_projected_gradients_together_is_clipped() -> None:
    moves = []
    for limit in (0.05, None, 1e6):
        model = Two()
        start = [p.detach().clone() for p in model.parameters()]
        options = {"lr": 1.0, "rank": 3, "update_proj_gap": 9, "scale": 1.0, "inner": "sgd", "max_grad_norm": limit}
        optimizer = GaLore(dict(model.named_parameters()), **options)  # type: ignore[arg-type]
        model(torch.ones(2, 9)).square().sum().backward()
        optimizer.step()
        moves.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)]))
    clipped, plain, far = moves
    assert float(clipped.norm()) == pytest.approx(0.05, rel=1e-4)  # rate 1, so the move is the projected gradient
    assert float(plain.norm()) > 0.1
    torch.testing.assert_close(clipped / clipped.norm(), plain / plain.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(plain, far)


def test_shared_basis_is_taken_once_and_leaves_one_term() -> None:
    shared = SharedBasis(1, 1, 3)
    model, optimizer, kept = train_two(early=True, micro=1, basis=shared, update_proj_gap=2)
    assert not any(kept)  # no refresh ever waits for a gradient
    for name, parameter in model.named_parameters():
        factors = optimizer.factors(name)
        assert factors.common
        ((left, right),) = factors.terms
        basis = right if parameter.shape[0] >= parameter.shape[1] else left
        assert torch.equal(basis, shared(name, parameter.shape))
        rebuilt = factors.apply(dict(Two().named_parameters())[name].detach())
        torch.testing.assert_close(rebuilt, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_basis_may_come_from_gradients_of_other_batches() -> None:
    other, own = gradients((12, 7), 2)
    parameter = weight((12, 7))
    optimizer = galore(parameter, refresh_batches=2)
    assert optimizer.refresh_due()
    parameter.grad = other
    optimizer.refresh()
    assert parameter.grad is None
    assert not optimizer.refresh_due()
    run(parameter, optimizer, [own])
    (basis,) = optimizer.state[parameter]["bases"]
    best = torch.linalg.svd(other).Vh[:3]
    assert float((other @ basis.T).square().sum()) > 0.98 * float((other @ best.T).square().sum())
