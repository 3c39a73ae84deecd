"""The truncated SVD from factors against a dense SVD in float64."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from common.errors import AggregationError
from common.linalg import lowrank
from common.linalg.lowrank import Term, inner_products, truncated_svd

FACTORS = {  # a list of (B, A) of 24 clients with rank 24, so that the core is large enough for iteration
    "unrelated": lambda g: [(normal(g, 300, 24), normal(g, 24, 200)) for _ in range(24)],
    "from one start": lambda g: from_one_start(g, 0.3),
    "hardly moved": lambda g: from_one_start(g, 1e-3),
    "duplicated": lambda g: [(normal(g, 300, 24), normal(g, 24, 200))] * 24,
    "shared A": lambda g: [(normal(g, 300, 24), a) for a in [normal(g, 24, 200)] for _ in range(24)],
    "cancelling": lambda g: [(sign * b, a) for b, a in unrelated(g, 12) for sign in (1, -1)],
    "rank 3": lambda g: [(b @ normal(g, 3, 24), a) for b in [normal(g, 300, 3)] for a in [normal(g, 24, 200)] * 24],
    "mostly zero": lambda g: [(b * (i == 5), a) for i, (b, a) in enumerate(unrelated(g, 24))],
    "tiny": lambda g: [(1e-20 * b, 1e-15 * a) for b, a in unrelated(g, 24)],
    "one huge": lambda g: [((1e6 if i == 3 else 1.0) * b, a) for i, (b, a) in enumerate(unrelated(g, 24))],
    "decaying": lambda g: [(b * torch.logspace(0, -5, 24), a) for b, a in unrelated(g, 24)],
}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def unrelated(g: torch.Generator, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(normal(g, 300, 24), normal(g, 24, 200)) for _ in range(count)]


def from_one_start(g: torch.Generator, moved: float, out: int = 300, in_: int = 200) -> list[tuple[Tensor, Tensor]]:
    b, a = normal(g, out, 24), normal(g, 24, in_)
    return [(b + moved * normal(g, out, 24), a + moved * normal(g, 24, in_)) for _ in range(24)]


def dense(terms: list[Term]) -> np.ndarray:
    return sum(t.weight * t.b.double().numpy() @ t.a.double().numpy() for t in terms)  # type: ignore[return-value]


def check(terms: list[Term], rank: int, tolerance: float = 2e-6) -> None:
    """Everything that a truncated SVD promises, relative to the size of what was added up."""
    result = truncated_svd(terms, rank)
    exact = dense(terms)
    sigma = np.linalg.svd(exact, compute_uv=False)
    size = sum(t.weight * float(t.b.double().norm() * t.a.double().norm()) for t in terms)
    u, s, vt = (x.double().numpy() for x in (result.u, result.s, result.vt))
    assert u.shape == (exact.shape[0], rank)
    assert vt.shape == (rank, exact.shape[1])
    np.testing.assert_allclose(s, sigma[:rank], rtol=1e-5, atol=tolerance * size)
    best = np.sqrt((sigma[rank:] ** 2).sum())
    assert np.linalg.norm(exact - (u * s) @ vt) <= best * (1 + 1e-5) + tolerance * size
    assert abs(result.energy - (sigma**2).sum()) <= tolerance * size**2
    used = s > 0
    np.testing.assert_allclose(u[:, used].T @ u[:, used], np.eye(used.sum()), atol=1e-4)
    np.testing.assert_allclose(vt[used] @ vt[used].T, np.eye(used.sum()), atol=1e-4)
    assert (np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1)[used] > 0).all()
    assert not u[:, ~used].any()
    assert not vt[~used].any()


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("rank", [1, 8, 24, 64, 200])
def test_equals_the_dense_svd(kind: str, rank: int) -> None:
    factors = FACTORS[kind](torch.Generator().manual_seed(1))
    check([Term(0.2 + i / 10, b, a) for i, (b, a) in enumerate(factors)], rank)


@pytest.mark.parametrize("kind", ["from one start", "hardly moved", "shared A", "rank 3"])
def test_iteration_decides_where_a_gap_follows_the_wanted_components(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Guards the test above: without the core to fall back on, these inputs are still solved."""

    def forbidden(*_: object) -> None:
        raise AssertionError("the core was used")

    monkeypatch.setattr(lowrank, "_from_product", forbidden)
    check([Term(1 / 24, b, a) for b, a in FACTORS[kind](torch.Generator().manual_seed(2))], 24)


@pytest.mark.parametrize("rank", [3, 24, 60])
@pytest.mark.parametrize("moved", [1e-3, 1e-2, 0.3])
def test_core_decides_large_layers_alone(monkeypatch: pytest.MonkeyPatch, moved: float, rank: int) -> None:
    """Guards what iteration falls back on, where the layer is larger than the core."""
    monkeypatch.setattr(lowrank, "_iterate", lambda *_: None)
    factors = from_one_start(torch.Generator().manual_seed(2), moved, 700, 600)
    check([Term(0.2 + i / 10, b, a) for i, (b, a) in enumerate(factors)], rank)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([0.0, 1e-3, 0.4, 5.0]), st.sampled_from([0.0, 1e-8, 1.0, 1e4])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_equals_the_dense_svd_for_any_shape(
    out: int, in_: int, clients: list[tuple[int, float, float]], seed: int, data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    terms = [Term(weight, scale * normal(g, out, r), normal(g, r, in_)) for r, weight, scale in clients]
    check(terms, data.draw(st.integers(1, min(out, in_))))


@pytest.mark.parametrize("count", [2, 150])
def test_float64_factors_give_float64_precision(count: int) -> None:
    g = torch.Generator().manual_seed(3)
    terms = [Term(0.5, normal(g, 30, 4).double(), normal(g, 4, 20).double()) for _ in range(count)]
    result, exact = truncated_svd(terms, 20), torch.from_numpy(dense(terms))
    assert float(torch.linalg.norm(result.u * result.s @ result.vt - exact)) < 1e-13 * float(torch.linalg.norm(exact))


def test_two_calls_agree_bit_for_bit() -> None:
    factors = FACTORS["unrelated"](torch.Generator().manual_seed(4))
    first, second = (truncated_svd([Term(0.1, b, a) for b, a in factors], 8) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in ((first.u, second.u), (first.s, second.s), (first.vt, second.vt)))


def test_ranks_and_lost_energy_follow_from_the_spectrum() -> None:
    g = torch.Generator().manual_seed(5)
    b, a = (torch.linalg.qr(normal(g, n, 4).double())[0] for n in (30, 20))
    result = truncated_svd([Term(1.0, b * torch.tensor([4.0, 2.0, 1.0, 0.0]), a.T)], 2)
    assert result.numerical_rank == 3
    assert result.stable_rank == pytest.approx(21 / 16)
    assert result.lost(2) == pytest.approx(1.0)
    assert result.lost(1) == pytest.approx(5.0)


@pytest.mark.parametrize("count", [3, 24])
def test_inner_products_are_those_of_the_products(count: int) -> None:
    terms = [Term(i / 7, b, a) for i, (b, a) in enumerate(unrelated(torch.Generator().manual_seed(6), count))]
    flat = torch.stack([(t.b.double() @ t.a.double()).flatten() for t in terms])
    exact = flat @ flat.T
    for got in (truncated_svd(terms, 4).inner, inner_products(terms)):
        torch.testing.assert_close(got, exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_bad_input_is_refused_by_name() -> None:
    b, a = torch.ones(5, 2), torch.ones(2, 4)
    with pytest.raises(AggregationError, match=r"layer: rank 5 is out of range; allowed: 1 to 4"):
        truncated_svd([Term(1.0, b, a)], 5, "layer")
    with pytest.raises(AggregationError, match=r"layer: factors of shape \(5, 2\) and \(3, 4\) do not fit"):
        truncated_svd([Term(1.0, b, torch.ones(3, 4))], 1, "layer")
    with pytest.raises(AggregationError, match=r"layer: factors of shape \(6, 2\) and \(2, 4\) do not fit \(5, r\)"):
        truncated_svd([Term(1.0, b, a), Term(1.0, torch.ones(6, 2), a)], 1, "layer")
    with pytest.raises(AggregationError, match=r"layer: no factors"):
        truncated_svd([], 1, "layer")
    with pytest.raises(AggregationError, match=r"layer: a factor holds values that are not finite"):
        truncated_svd([Term(1.0, b * float("nan"), a)], 1, "layer")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("scipy.linalg.eigh", np.linalg.LinAlgError),
        ("torch.linalg.svd", torch.linalg.LinAlgError),  # type: ignore[attr-defined]
    ],
)
def test_failure_to_converge_names_the_layer(
    monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(where, Mock(side_effect=error("no convergence")))
    with pytest.raises(AggregationError, match=r"layers\.3: the singular values do not converge"):
        truncated_svd([Term(1.0, torch.ones(5, 2), torch.ones(2, 4))], 1, "layers.3")
