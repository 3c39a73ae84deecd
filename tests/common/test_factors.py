"""Factors of a round's change travel in place of weights, and make the same weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.galore import GaLore
from common import wire
from common.errors import WireError
from common.factors import Factors, pack, unpack

NAME = "layers.0.up_proj.weight"


def trained(
    shape: tuple[int, int], dtype: torch.dtype, steps: int, gap: int, decay: float, seed: int
) -> tuple[Tensor, Tensor, GaLore]:
    """A weight before and after some GaLore steps of rank 3."""
    g = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape, generator=g).to(dtype))
    start = weight.detach().clone()
    optimizer = GaLore({NAME: weight}, lr=0.05, rank=3, update_proj_gap=gap, scale=0.7, weight_decay=decay)
    for _ in range(steps):
        weight.grad = torch.randn(shape, generator=g).to(dtype)
        optimizer.step()
    return start, weight.detach(), optimizer


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(40, 24), (24, 40), (30, 30)]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.4]),
    st.integers(0, 10**6),
)
def test_weight_made_of_factors_is_the_trained_weight(
    shape: tuple[int, int], steps: int, gap: int, decay: float, seed: int
) -> None:
    start, weight, optimizer = trained(shape, torch.float32, steps, gap, decay, seed)
    sent = wire.decode(wire.encode(pack(NAME, optimizer.factors(NAME), weight)))
    made, factored = unpack(sent, {NAME: start})
    assert made.keys() == {NAME}
    assert float((made[NAME].double() - weight.double()).norm() / weight.double().norm()) < 1e-6
    refreshes = -(-steps // gap)
    assert (factored == {NAME}) == (3 * refreshes * sum(shape) < shape[0] * shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weight_travels_in_float32_factors_that_lose_no_small_step(dtype: torch.dtype) -> None:
    start, weight, optimizer = trained((40, 24), dtype, 3, 4, 0.1, 0)
    made, factored = unpack(pack(NAME, optimizer.factors(NAME), weight), {NAME: start})
    assert factored == {NAME}
    assert made[NAME].dtype == torch.float32
    assert torch.equal(made[NAME].to(dtype), weight)
    exact = optimizer.factors(NAME)
    product = sum((left.double() @ right.double() for left, right in exact.terms), exact.decay * start.double())
    torch.testing.assert_close(made[NAME].double(), product, rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_factors_are_smaller_by_their_rank() -> None:
    start, weight, optimizer = trained((400, 240), torch.float32, 1, 1, 0.0, 0)
    sent = pack(NAME, optimizer.factors(NAME), weight)
    assert {n: tuple(t.shape) for n, t in sent.items()} == {
        f"{NAME}/decay": (),
        f"{NAME}/left": (400, 3),
        f"{NAME}/right": (3, 240),
    }
    assert start.numel() / sum(t.numel() for t in sent.values()) > 49


def test_weight_that_never_moved_is_a_decay_of_one() -> None:
    start = torch.randn(6, 4)
    sent = pack(NAME, Factors(1.0, []), start)
    assert torch.equal(unpack(wire.decode(wire.encode(sent)), {NAME: start})[0][NAME], start)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({NAME: torch.zeros(40, 24)}, "came both whole and in factors"),
        ({f"{NAME}/right": None}, f"{NAME}: its factor '{NAME}/right' is missing"),
        ({f"{NAME}/decay": None}, f"{NAME}: its factor '{NAME}/decay' is missing"),
        ({f"{NAME}/left": torch.zeros(41, 3)}, r"\(41, 3\), \(3, 24\), \(\) do not fit a weight of shape \(40, 24\)"),
        ({f"{NAME}/left": torch.zeros(40, 2)}, "do not fit"),
        ({f"{NAME}/left": torch.zeros(40)}, "do not fit"),
        ({f"{NAME}/decay": torch.ones(2)}, "do not fit"),
        ({f"{NAME}/left": torch.zeros(40, 25), f"{NAME}/right": torch.zeros(25, 24)}, "with R up to 24"),
        ({f"{NAME}/left": torch.zeros(40, 3).double()}, "allowed: float32, finite"),
        ({f"{NAME}/decay": torch.tensor(float("nan"))}, "allowed: float32, finite"),
    ],
)
def test_factors_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], says: str) -> None:
    start, weight, optimizer = trained((40, 24), torch.float32, 1, 1, 0.0, 0)
    sent = {**pack(NAME, optimizer.factors(NAME), weight), **change}
    with pytest.raises(WireError, match=says):
        unpack({name: tensor for name, tensor in sent.items() if tensor is not None}, {NAME: start})


def test_other_tensors_are_left_alone() -> None:
    sent = {"x": torch.ones(1), "unknown/left": torch.ones(2, 2)}
    assert unpack(sent, {NAME: torch.zeros(2, 2)}) == (sent, set())


def test_tensor_that_is_no_matrix_comes_whole() -> None:
    parts = {"bias/left": torch.ones(2, 1), "bias/right": torch.ones(1, 2), "bias/decay": torch.ones(())}
    with pytest.raises(WireError, match=r"bias: shape \(4,\) has no factors; send it whole"):
        unpack(parts, {"bias": torch.zeros(4)})
