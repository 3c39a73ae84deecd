"""GaLore against the paper in float64, against torch and galore-torch, and its exact factors."""

import contextlib
import copy
import io
from typing import Any, Literal

import numpy as np
import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from client.training.galore import GaLore
from common.errors import TrainingError
from common.linalg.range_finder import range_finder
from common.linalg.subspace import SharedBasis
from common.protocol.factors import Exchange, Precision, pack, unpack

SHAPES = [(12, 7), (7, 12), (9, 9)]


def gradients(shape: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 9) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def run(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for gradient in grads:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def galore(parameter: nn.Parameter, **options: object) -> GaLore:
    base: dict[str, object] = {"lr": 0.02, "rank": 3, "update_proj_gap": 4, "scale": 0.7}
    return GaLore({"w": parameter}, **{**base, **options})  # type: ignore[arg-type]


def paper(start: np.ndarray, grads: list[np.ndarray], bases: list[np.ndarray], gap: int, **o: float) -> np.ndarray:
    """Algorithm 1 of arXiv 2403.03507 with Adam, in float64, with the given orthonormal bases."""
    w, m, v = start.copy(), 0.0, 0.0
    right = w.shape[0] >= w.shape[1]
    for step, g in enumerate(grads):
        p = bases[step // gap]
        r = g @ p.T if right else p.T @ g
        m = o["b1"] * m + (1 - o["b1"]) * r
        v = o["b2"] * v + (1 - o["b2"]) * r * r
        m_hat, v_hat = m / (1 - o["b1"] ** (step + 1)), v / (1 - o["b2"] ** (step + 1))
        n = m_hat / (np.sqrt(v_hat) + o["eps"])
        w = w - o["lr"] * o["scale"] * (n @ p if right else p @ n)
        w = w * (1 - o["lr"] * o["wd"])
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_the_paper_in_float64_over_two_refreshes(shape: tuple[int, int], decay: float) -> None:
    grads, parameter = gradients(shape, 10), weight(shape)
    start = parameter.detach().double().numpy().copy()
    optimizer = galore(parameter, weight_decay=decay, eps=1e-12)
    run(parameter, optimizer, grads)
    bases = [b.double().numpy() for b in optimizer.state[parameter]["bases"]]
    expected = paper(
        start, [g.double().numpy() for g in grads], bases, 4, lr=0.02, scale=0.7, wd=decay, b1=0.9, b2=0.999, eps=1e-12
    )
    change = np.linalg.norm(expected - start)
    assert np.linalg.norm(parameter.detach().double().numpy() - expected) / change < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_plain_sgd_equals_torch_sgd(shape: tuple[int, int]) -> None:
    ours, theirs = weight(shape), weight(shape)
    grads = gradients(shape, 6)
    run(ours, galore(ours, rank=min(shape), scale=1.0, inner="sgd"), grads)
    run(theirs, torch.optim.SGD([theirs], lr=0.02), grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_equals_galore_torch_up_to_the_choice_of_basis(shape: tuple[int, int]) -> None:
    """Both span the leading singular subspace, so projecting a gradient onto it and back is the same."""
    u, _, vt = torch.linalg.svd(gradients(shape, 1)[0], full_matrices=False)
    spectrum = torch.tensor([9.0, 7.0, 5.0] + [0.5] * (min(shape) - 3))
    gradient = u @ torch.diag(spectrum) @ vt
    projector = GaLoreProjector(3, update_proj_gap=1, scale=1.0, proj_type="std")
    peer = projector.project_back(projector.project(gradient.clone(), 0))
    ours = weight(shape)
    before = ours.detach().clone()
    run(ours, galore(ours, lr=1.0, scale=1.0, inner="sgd"), [gradient])
    torch.testing.assert_close(before - ours.detach(), peer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_exactly_the_change_of_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    parameter = weight(shape, dtype)
    start = parameter.detach().clone()
    optimizer = galore(parameter, weight_decay=0.4)
    run(parameter, optimizer, gradients(shape, 11))
    factors = optimizer.factors("w")
    assert len(factors.terms) == 3
    assert all(left.shape == (shape[0], 3) and right.shape == (3, shape[1]) for left, right in factors.terms)
    rebuilt = factors.decay * start.double() + sum(
        (a.double() @ b.double() for a, b in factors.terms), start=0 * start.double()
    )
    if dtype == torch.float32:
        error = (parameter.detach().double() - rebuilt).norm() / (rebuilt - start.double()).norm()
        assert float(error) < 1e-5
    else:
        torch.testing.assert_close(parameter.detach(), rebuilt.to(dtype), rtol=1e-2, atol=1e-3)
        assert torch.equal(parameter.detach(), factors.apply(start).to(dtype))


def test_bfloat16_weight_loses_no_small_step() -> None:
    """In place, steps of 1e-5 vanish in bfloat16; from the factors they add up."""
    coarse, fine = weight((16, 8), torch.bfloat16), weight((16, 8), torch.bfloat16)
    fine.data = fine.data.float()
    start = fine.detach().clone()
    grads = gradients((16, 8), 400)
    run(coarse, galore(coarse, lr=1e-5, scale=1.0, update_proj_gap=1000), grads)
    optimizer = galore(fine, lr=1e-5, scale=1.0, update_proj_gap=1000)
    run(fine, optimizer, grads)
    assert float((coarse.detach().float() - fine.detach()).abs().max()) <= float((start.abs().max() + 0.01) * 2**-8)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_weight_without_gradient_sends_zeros_of_the_shared_rank(shape: tuple[int, int], precision: Precision) -> None:
    exchange = Exchange(precision, SharedBasis(1, 2, 3))
    parameter, other = weight(shape), weight(shape)
    start = parameter.detach().clone()
    options: dict[str, Any] = {"lr": 0.1, "rank": 3, "update_proj_gap": 1, "scale": 1.0, "basis": exchange.basis}
    optimizer = GaLore({"w": parameter, "v": other}, weight_decay=0.1, **options)
    run(other, optimizer, gradients(shape, 1))
    _, made = unpack(pack("w", optimizer.factors("w"), start, exchange), {"w": shape}, exchange)
    assert made["w"].common
    assert torch.equal(made["w"].apply(start), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_save_load_continue_is_bit_identical(shape: tuple[int, int], dtype: torch.dtype) -> None:
    grads = gradients(shape, 9)
    straight = weight(shape, dtype)
    run(straight, galore(straight, weight_decay=0.1), grads)
    first = weight(shape, dtype)
    optimizer = galore(first, weight_decay=0.1)
    run(first, optimizer, grads[:5])
    file = io.BytesIO()
    torch.save({"w": first.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = nn.Parameter(saved["w"])
    continued = galore(second, weight_decay=0.1)
    continued.load_state_dict(saved["optimizer"])
    run(second, continued, grads[5:])
    assert torch.equal(straight, second)


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
def test_state_has_the_size_of_the_formula(shape: tuple[int, int], inner: Literal["adamw", "sgd"]) -> None:
    parameter = weight(shape)
    optimizer = galore(parameter, inner=inner)
    run(parameter, optimizer, gradients(shape, 2))
    state = optimizer.state[parameter]
    low = (shape[0], 3) if shape[0] >= shape[1] else (3, shape[1])
    numbers = 3 * min(shape) + low[0] * low[1]  # P and R
    if inner == "adamw":
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == low
        numbers += 2 * low[0] * low[1]
    held = [t for v in state.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held) == numbers
    assert all(t.dtype == torch.float32 for t in held)


@settings(max_examples=25, deadline=None)
@given(st.integers(90, 120), st.integers(8, 90), st.integers(1, 6), st.floats(0.0, 2.0), st.integers(0, 1000))
def test_range_finder_captures_99_percent_of_what_the_svd_captures(
    rows: int, columns: int, rank: int, fall: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    values = torch.arange(1, columns + 1).float() ** -fall
    matrix = u @ torch.diag(values) @ v.T
    found = range_finder(matrix, rank, None, generator)
    torch.testing.assert_close(found.T @ found, torch.eye(rank), rtol=0, atol=1e-5)
    assert float((matrix @ found).square().sum()) >= 0.99 * float(values[:rank].square().sum())


@pytest.mark.parametrize(("iterations", "cold_at_most"), [(1, 0.5), (2, 0.9), (3, 0.96)])
def test_warm_start_captures_at_once_what_a_cold_one_iterates_for(
    monkeypatch: pytest.MonkeyPatch, iterations: int, cold_at_most: float
) -> None:
    """On a matrix that changes slowly."""
    before, moved = gradients((400, 200), 2)
    last, now = range_finder(before, 8, None, torch.Generator().manual_seed(0)), before + 0.01 * moved
    exact = torch.linalg.svdvals(now)[:8].square().sum()
    monkeypatch.setattr("common.linalg.range_finder._MOST_ITERATIONS", iterations)
    cold, warm = (range_finder(now, 8, start, torch.Generator().manual_seed(1)) for start in (None, last))
    captured = [float((now @ basis).square().sum() / exact) for basis in (cold, warm)]
    assert captured[0] < cold_at_most
    assert captured[1] > 0.999


def test_same_seed_same_weights_and_other_seed_other_directions() -> None:
    results = []
    for seed in (1, 1, 2):
        parameter = weight((40, 30))
        run(parameter, galore(parameter, seed=seed), gradients((40, 30), 5))
        results.append(parameter.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_learning_rate_scheduler_works() -> None:
    parameter = weight((12, 7))
    before = parameter.detach().clone()
    optimizer = galore(parameter)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    run(parameter, optimizer, gradients((12, 7), 1))
    scheduler.step()
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize(
    ("params", "options", "says"),
    [
        ({}, {}, "no weight to project"),
        (
            {"norm.weight": nn.Parameter(torch.zeros(4))},
            {},
            r"norm.weight: GaLore projects matrices, this has shape \(4,\)",
        ),
        ({"w": nn.Parameter(torch.zeros(4, 8))}, {"rank": 5}, r"w: GaLore rank 5; allowed for shape \(4, 8\): 1 to 4"),
        ({"w": nn.Parameter(torch.zeros(4, 8))}, {"rank": 0}, r"w: GaLore rank 0"),
    ],
)
def test_refuses_to_run_without_projection(params: dict[str, nn.Parameter], options: dict[str, int], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        GaLore(params, lr=0.1, update_proj_gap=1, scale=1.0, rank=options.get("rank", 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_named_and_changes_nothing(bad: float) -> None:
    parameter = weight((12, 7))
    before = copy.deepcopy(parameter.detach())
    gradient = torch.ones(12, 7)
    gradient[3, 3] = bad
    with pytest.raises(TrainingError, match="w: its gradient is not finite"):
        run(parameter, galore(parameter), [gradient])
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unprojected_tensors_go_as_the_inner_optimizer_alone_would(dtype: torch.dtype) -> None:
    """Beside a projected weight, and through both ways of handing over gradients."""
    starts = {"head": weight((3, 5), dtype).detach(), "bias": torch.zeros(3, dtype=dtype)}
    params = {"w": weight((12, 7), dtype), **{name: nn.Parameter(start.clone()) for name, start in starts.items()}}
    theirs = {name: nn.Parameter(start.double()) for name, start in starts.items()}
    ours = GaLore(params, lr=0.02, rank=3, update_proj_gap=2, scale=0.25, unprojected=list(starts))
    peer = torch.optim.AdamW(theirs.values(), lr=0.02, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for step in range(5):
        factors = {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in params.items()}
        with ours.projecting() if step % 2 else contextlib.nullcontext():
            torch.stack([(p * factors[name]).sum().float() for name, p in params.items()]).sum().backward()
        assert all((p.grad is None) == bool(step % 2) for p in params.values())
        for name, parameter in theirs.items():
            parameter.grad = factors[name].double()
        ours.step()
        peer.step()
    for name, start in starts.items():
        torch.testing.assert_close(ours.whole(name, start).double(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(params[name].detach(), theirs[name].detach().to(dtype), rtol=1e-2, atol=1e-6)
    assert torch.equal(params["bias"].detach(), ours.whole("bias", starts["bias"]).to(dtype))
    assert len(ours.factors("w").terms) == 3
