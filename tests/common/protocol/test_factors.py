"""Factors of a round's change travel in place of weights, and make the same weights."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from client.training.galore import GaLore
from common.errors import WireError
from common.linalg.subspace import SharedBasis
from common.protocol import wire
from common.protocol.factors import Exchange, Factors, Precision, pack, rounding_error, unpack

NAME = "layers.0.up_proj.weight"
OWN = Exchange()
SHARED = Exchange(basis=SharedBasis(seed=1, server_round=2, rank=3))


def trained(
    shape: tuple[int, int], dtype: torch.dtype, steps: int, gap: int, decay: float, seed: int, exchange: Exchange = OWN
) -> tuple[Tensor, Tensor, GaLore]:
    """A weight before and after some GaLore steps of rank 3."""
    g = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape, generator=g).to(dtype))
    start = weight.detach().clone()
    options = {"lr": 0.05, "rank": 3, "update_proj_gap": gap, "scale": 0.7, "weight_decay": decay}
    optimizer = GaLore({NAME: weight}, basis=exchange.basis, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        weight.grad = torch.randn(shape, generator=g).to(dtype)
        optimizer.step()
    return start, weight.detach(), optimizer


def received(sent: dict[str, Tensor], start: Tensor, exchange: Exchange) -> Tensor:
    """The weight that a receiver makes of what travelled."""
    whole, factors = unpack(wire.decode(wire.encode(sent)), {NAME: tuple(start.shape)}, exchange)
    assert whole.keys() | factors.keys() == {NAME}
    return factors[NAME].apply(start) if NAME in factors else whole[NAME]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(40, 24), (24, 40), (30, 30)]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([OWN, SHARED]),
    st.integers(0, 10**6),
)
def test_weight_made_of_factors_is_the_trained_weight(
    shape: tuple[int, int], steps: int, gap: int, decay: float, exchange: Exchange, seed: int
) -> None:
    start, weight, optimizer = trained(shape, torch.float32, steps, gap, decay, seed, exchange)
    sent = pack(NAME, optimizer.factors(NAME), start, exchange)
    made = received(sent, start, exchange)
    assert float((made.double() - weight.double()).norm() / weight.double().norm()) < 1e-6
    numbers = 3 * max(shape) if exchange is SHARED else 3 * -(-steps // gap) * sum(shape)
    assert (NAME not in sent) == (4 * numbers + 8 < 4 * shape[0] * shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weight_travels_in_float32_and_loses_no_small_step(dtype: torch.dtype) -> None:
    for gap in (4, 1):  # with three refreshes the factors would be larger, and the weight travels whole
        start, weight, optimizer = trained((40, 24), dtype, 6, gap, 0.1, 0)
        exact = optimizer.factors(NAME)
        made = received(pack(NAME, exact, start, OWN), start, OWN)
        assert made.dtype == torch.float32
        assert torch.equal(made.to(dtype), weight)
        product = sum((left.double() @ right.double() for left, right in exact.terms), exact.decay * start.double())
        torch.testing.assert_close(made.double(), product, rtol=0, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(400, 240), (240, 400)])
def test_factors_are_smaller_by_their_rank_and_a_shared_basis_stays_at_home(shape: tuple[int, int]) -> None:
    start, _, optimizer = trained(shape, torch.float32, 1, 1, 0.0, 0)
    sent = pack(NAME, optimizer.factors(NAME), start, OWN)
    both = {f"{NAME}/decay": (), f"{NAME}/left": (shape[0], 3), f"{NAME}/right": (3, shape[1])}
    assert {n: tuple(t.shape) for n, t in sent.items()} == both
    start, _, optimizer = trained(shape, torch.float32, 1, 1, 0.0, 0, SHARED)
    sent = pack(NAME, optimizer.factors(NAME), start, SHARED)
    basis = f"{NAME}/right" if shape[0] >= shape[1] else f"{NAME}/left"
    assert {n: tuple(t.shape) for n, t in sent.items()} == {n: s for n, s in both.items() if n != basis}


def test_shared_basis_is_orthonormal_and_the_same_for_the_same_seed_round_and_weight() -> None:
    for shape in ((40, 24), (24, 40)):
        basis = SharedBasis(1, 2, 5)("w", shape)
        assert basis.shape == ((5, 24) if shape[0] >= shape[1] else (24, 5))
        gram = basis @ basis.T if shape[0] >= shape[1] else basis.T @ basis
        torch.testing.assert_close(gram, torch.eye(5), rtol=0, atol=1e-6)
        assert torch.equal(basis, SharedBasis(1, 2, 5)("w", shape))
        for other in (
            SharedBasis(1, 3, 5)("w", shape),
            SharedBasis(2, 2, 5)("w", shape),
            SharedBasis(1, 2, 5)("v", shape),
        ):
            assert not torch.equal(basis, other)


@pytest.mark.parametrize(("precision", "smaller", "error"), [("bfloat16", 1.9, 5e-3), ("int8", 3.7, 3e-2)])
@pytest.mark.parametrize("shared", [False, True])
def test_rounded_factors_are_smaller_and_their_error_is_told(
    precision: Precision, smaller: float, error: float, shared: bool
) -> None:
    exchange = Exchange(precision, SHARED.basis if shared else None)
    start, weight, optimizer = trained((400, 240), torch.float32, 3, 9, 0.1, 0, exchange)
    exact = optimizer.factors(NAME)
    sizes = [
        sum(t.numel() * t.element_size() for t in pack(NAME, exact, start, e).values())
        for e in (Exchange(basis=exchange.basis), exchange)
    ]
    assert sizes[0] / sizes[1] > smaller
    made = received(pack(NAME, exact, start, exchange), start, exchange).double()
    moved = weight.double() - exact.decay * start.double()
    measured = float((made - weight.double()).norm() / moved.norm())
    told = rounding_error({NAME: exact}, {NAME: (400, 240)}, exchange)
    assert 0 < told < error
    assert told == pytest.approx(measured, rel=1e-2)
    assert rounding_error({NAME: exact}, {NAME: (400, 240)}, Exchange(basis=exchange.basis)) == 0.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_what_is_packed_is_unpacked_however_many_bases_there_were(precision: Precision, shape: tuple[int, int]) -> None:
    """Rounded factors may be smaller than the weight although they have more directions than it."""
    exchange, start = Exchange(precision), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    travelled = []
    for bases in range(1, 33):
        g = torch.Generator().manual_seed(bases)
        terms = [(torch.randn(shape[0], 2, generator=g), torch.randn(2, shape[1], generator=g)) for _ in range(bases)]
        exact = Factors(0.9, terms)
        sent = pack(NAME, exact, start, exchange)
        made, whole = received(sent, start, exchange), NAME in sent
        travelled.append(not whole)
        error = float((made - exact.apply(start)).norm() / exact.change(start).norm())
        assert error <= (1e-6 if whole or precision == "float32" else 2e-2)
        assert (rounding_error({NAME: exact}, {NAME: shape}, exchange) == 0) == (whole or precision == "float32")
    assert travelled == [bases <= (6 if precision == "float32" else 8) for bases in range(1, 33)]


def test_int8_keeps_a_direction_that_is_zero_and_the_sign_of_the_largest() -> None:
    left, right = torch.tensor([[0.0, -4.0], [0.0, 1.0]] * 20), torch.ones(2, 30)
    made = received(
        pack(NAME, Factors(1.0, [(left, right)]), torch.zeros(40, 30), Exchange("int8")),
        torch.zeros(40, 30),
        Exchange("int8"),
    )
    torch.testing.assert_close(made, left @ right, rtol=0, atol=4 / 127)


def test_weight_that_never_moved_is_a_decay_of_one() -> None:
    start = torch.randn(6, 4)
    for exchange in (OWN, Exchange("int8")):
        assert torch.equal(received(pack(NAME, Factors(1.0, []), start, exchange), start, exchange), start)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({NAME: torch.zeros(40, 24)}, "came both whole and in factors"),
        ({f"{NAME}/right": None}, f"{NAME}: its factor '{NAME}/right' is missing; allowed in this federation: "),
        ({f"{NAME}/decay": None}, f"{NAME}: its factor '{NAME}/decay' is missing"),
        ({f"{NAME}/left-scale": torch.ones(1, 3)}, f"its factor '{NAME}/left-scale' was not to come"),
        ({f"{NAME}/left": torch.zeros(41, 3)}, r"\(41, 3\), \(3, 24\) do not fit a weight of shape \(40, 24\)"),
        ({f"{NAME}/left": torch.zeros(40, 2)}, "do not fit"),
        ({f"{NAME}/left": torch.zeros(40)}, "do not fit"),
        ({f"{NAME}/decay": torch.ones(2)}, r"do not fit .*; allowed: \(\), \(40, R\), \(R, 24\) with R up to 24"),
        ({f"{NAME}/left": torch.zeros(40, 25), f"{NAME}/right": torch.zeros(25, 24)}, "with R up to 24"),
        ({f"{NAME}/left": torch.zeros(40, 3).double()}, "is torch.float64; allowed: torch.float32"),
        ({f"{NAME}/decay": torch.tensor(float("nan")).double()}, "decay is nan; allowed: a finite number"),
    ],
)
def test_factors_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], says: str) -> None:
    start, _, optimizer = trained((40, 24), torch.float32, 1, 1, 0.0, 0)
    sent = {**pack(NAME, optimizer.factors(NAME), start, OWN), **change}
    with pytest.raises(WireError, match=says):
        unpack({name: tensor for name, tensor in sent.items() if tensor is not None}, {NAME: (40, 24)}, OWN)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{NAME}/right": torch.zeros(3, 24)}, f"its factor '{NAME}/right' was not to come"),
        ({f"{NAME}/left": torch.zeros(40, 4)}, r"\(40, 4\) do not fit .*; allowed: \(\), \(40, R\) with R up to 3"),
    ],
)
def test_own_basis_is_refused_where_it_is_shared(change: dict[str, Tensor], says: str) -> None:
    start, _, optimizer = trained((40, 24), torch.float32, 1, 1, 0.0, 0, SHARED)
    sent = {**pack(NAME, optimizer.factors(NAME), start, SHARED), **change}
    with pytest.raises(WireError, match=says):
        unpack(sent, {NAME: (40, 24)}, SHARED)


def test_other_tensors_are_left_alone() -> None:
    sent = {"x": torch.ones(1), "unknown/left": torch.ones(2, 2)}
    assert unpack(sent, {NAME: (2, 2)}, OWN) == (sent, {})


def test_tensor_that_is_no_matrix_comes_whole() -> None:
    parts = {"bias/left": torch.ones(2, 1), "bias/right": torch.ones(1, 2), "bias/decay": torch.ones(())}
    with pytest.raises(WireError, match=r"bias: shape \(4,\) has no factors; send it whole"):
        unpack(parts, {"bias": (4,)}, OWN)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_square_is_that_of_the_change_also_when_start_or_basis_is_another(shape: tuple[int, int], common: bool) -> None:
    """What is remembered of W_0 holds for its contents and for one basis alone."""
    g = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=g)

    def told(left: Tensor, right: Tensor) -> tuple[float, float]:
        change = (0.9 - 1) * start.double() + left.double() @ right.double()
        return Factors(0.9, [(left, right)], common).square(start), float(change.square().sum())

    left, right = torch.randn(shape[0], 2, generator=g), torch.randn(2, shape[1], generator=g)
    for ours, exact in (told(left, right), told(left * 2, right), told(left, right * 3), told(left * 2, right * 3)):
        assert ours == pytest.approx(exact, rel=1e-5)
    start[0] += 5
    ours, exact = told(left, right)
    assert ours == pytest.approx(exact, rel=1e-5)
