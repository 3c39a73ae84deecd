"""GaLore against the paper in float64, against torch and galore-torch, and its exact factors."""

import contextlib
import copy
import io
import sys
from typing import Any, Literal

import numpy as np
import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from client.training.galore import GaLore
from client.training.range_finder import range_finder
from common.errors import TrainingError
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


def test_start_round_takes_the_present_weight_as_start() -> None:
    parameter = weight((12, 7))
    optimizer = galore(parameter, update_proj_gap=100)
    run(parameter, optimizer, gradients((12, 7), 3))
    start = parameter.detach().clone()
    optimizer.start_round()
    run(parameter, optimizer, gradients((12, 7), 3, seed=5))
    torch.testing.assert_close(optimizer.factors("w").apply(start), parameter.detach(), rtol=1e-5, atol=1e-6)


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
    monkeypatch.setattr("client.training.range_finder._MOST_ITERATIONS", iterations)
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
