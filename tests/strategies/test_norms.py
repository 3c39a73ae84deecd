"""The absolute bound holds for every honest training, and the cohort's for most of a cohort."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from client.training.galore import GaLore
from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import RefusedUpdate
from common.protocol.messages import Declared
from strategies.admission.bounds import (
    ADAM_STEP,
    change_norms,
    check_possible,
    cohort_bound,
    largest_change,
    largest_entry,
    total,
    update_size,
)
from strategies.rule import Update

NAME = "model.layers.0.up.weight"


def federation(strategy: dict[str, object], **training: object) -> FederationConfig:
    training = {"learning_rate": 0.1, "local_steps": 7, **training}
    return parse(
        {"name": "x", "model": {"path": "m"}, "strategy": strategy, "rounds": 1, "training": training},
        FederationConfig,
        "x",
    )


FEDFTG, ROLORA = {"name": "fedftg", "rank": 3, "scale": 0.5}, {"name": "rolora", "rank": 3}


def gradients(kind: str, shape: tuple[int, int], steps: int) -> list[Tensor]:
    """Gradients that make Adam step far: steady ones, growing ones, and a burst after silence."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=g)
    scales = {"steady": [1.0] * steps, "growing": [1.5**i for i in range(steps)], "burst": [0.0] * (steps - 1) + [1.0]}
    return [first * scale for scale in scales[kind]]


@pytest.mark.parametrize("kind", ["steady", "growing", "burst"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("strategy", [FEDFTG, ROLORA], ids=["fedftg", "rolora"])
@pytest.mark.parametrize("steps", [1, 40])
def test_no_training_moves_further_than_the_bound(
    strategy: dict[str, object], kind: str, decay: float, steps: int
) -> None:
    config = federation(strategy, local_steps=steps, weight_decay=decay, max_grad_norm=None)
    start = torch.randn(12, 9, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(start.clone())
    optimizer: torch.optim.Optimizer
    if strategy is FEDFTG:
        optimizer = GaLore(
            {NAME: weight}, lr=0.1, rank=3, update_proj_gap=5, scale=0.5, weight_decay=decay, max_grad_norm=None
        )
    else:
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=decay)
    for gradient in gradients(kind, (12, 9), steps):
        weight.grad = gradient.clone()
        optimizer.step()
    moved = float((weight.detach() - start).norm())
    bound = largest_change(NAME, start, 100, config.training, config.strategy)
    assert 0 < moved <= 1.0001 * bound / 2  # half of it is for rounding
    if strategy is not FEDFTG:
        entry = largest_entry(NAME, start, 100, config.training, config.strategy)
        assert float((weight.detach() - start).abs().max()) <= 1.0001 * entry / 2


@pytest.mark.parametrize("kind", ["steady", "burst"])
def test_no_training_moves_a_head_further_than_its_bound(kind: str) -> None:
    config = federation(FEDFTG, max_grad_norm=None)
    head, other = nn.Parameter(torch.zeros(12, 9)), nn.Parameter(torch.zeros(12, 9))
    optimizer = GaLore(
        {NAME: other, "score.weight": head}, lr=0.1, rank=3, update_proj_gap=5, scale=0.5, unprojected=["score.weight"]
    )
    for gradient in gradients(kind, (12, 9), 7):
        head.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    bound = largest_change("score.weight", torch.zeros(12, 9), 100, config.training, config.strategy)
    assert 0 < float(head.detach().norm()) <= bound / 2
    assert bound == pytest.approx(
        2 * math.sqrt(9 / 3) * largest_change(NAME, other, 1, config.training, config.strategy)
    )


def test_burst_after_silence_comes_near_the_bound_on_adams_step() -> None:
    """So the constant is not far too large: g_i = (b1 / b2)^(t - i) is the worst sequence."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0, eps=0.0)
    steps = 6000  # until the correction of the bias is gone
    for i in range(1, steps + 1):
        before = weight.item()
        weight.grad = torch.tensor([max((0.9 / 0.999) ** (steps - i), 1e-150)], dtype=torch.float64)
        optimizer.step()
    assert 0.99 * ADAM_STEP < abs(weight.item() - before) <= ADAM_STEP * 1.0001


def test_sgd_is_bounded_by_its_clipping_and_by_nothing_else() -> None:
    base = torch.zeros(4, 5)
    clipped = federation(ROLORA, optimizer="sgd", max_grad_norm=0.5)
    assert largest_change(NAME, base, 1, clipped.training, clipped.strategy) == pytest.approx(2 * 7 * 0.1 * 0.5)
    free = federation(ROLORA, optimizer="sgd", max_grad_norm=None)
    assert math.isinf(largest_change(NAME, base, 1, free.training, free.strategy))


def test_epochs_count_as_the_steps_that_the_rows_make() -> None:
    base = torch.zeros(4, 5)
    by_epochs = federation(ROLORA, local_steps=None, local_epochs=2, batch_size=4, gradient_accumulation=2)
    by_steps = federation(ROLORA, local_steps=6)
    bounds = [
        largest_change(NAME, base, 17, c.training, c.strategy) for c in (by_epochs, by_steps)
    ]  # 3 steps in a pass
    assert bounds[0] == bounds[1]


@pytest.mark.parametrize("factor", [1e6, -1e6, float("inf")])
def test_scaled_update_is_refused_with_client_tensor_norm_and_bound(factor: float) -> None:
    config, base = federation(ROLORA), {NAME: torch.zeros(12, 9)}
    honest = Update("site-b", 10, {NAME: torch.full((12, 9), 0.1)})
    check_possible(honest, change_norms(honest, base), base, config.training, config.strategy)
    scaled = Update("site-b", 10, {NAME: honest.tensors[NAME] * factor})
    with pytest.raises(RefusedUpdate, match=rf"site-b: {NAME} moved by .*; allowed: \d+"):
        check_possible(scaled, change_norms(scaled, base), base, config.training, config.strategy)


def test_update_within_its_norm_but_all_in_one_place_is_refused() -> None:
    config, base = federation(ROLORA), {NAME: torch.zeros(12, 9)}
    bound = largest_change(NAME, base[NAME], 10, config.training, config.strategy)
    tensor = torch.zeros(12, 9)
    tensor[3, 4] = 0.9 * bound
    update = Update("site-b", 10, {NAME: tensor})
    with pytest.raises(RefusedUpdate, match=rf"site-b: an entry of {NAME} moved by .*; allowed: 1\.4"):
        check_possible(update, change_norms(update, base), base, config.training, config.strategy)


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=9), st.data())
def test_few_wild_clients_are_beyond_the_cohorts_bound_and_no_honest_one_is(
    norms: list[float], data: st.DataObject
) -> None:
    wild = data.draw(st.integers(0, (len(norms) - 1) // 2))
    all_norms = {f"h{i}": norm for i, norm in enumerate(norms)} | {f"w{i}": 1e3 for i in range(wild)}
    bound = cohort_bound(all_norms, 10.0)
    assert all(norm <= bound for name, norm in all_norms.items() if name.startswith("h"))
    assert all(norm > bound for name, norm in all_norms.items() if name.startswith("w"))


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20), st.floats(1.0, 100.0))
def test_cohort_never_shuts_out_half_of_itself(norms: list[float], ratio: float) -> None:
    bound = cohort_bound({str(i): norm for i, norm in enumerate(norms)}, ratio)
    assert sum(norm > bound for norm in norms) * 2 < max(len(norms), 1)


def test_half_a_cohort_that_hardly_moves_does_not_evict_the_other_half() -> None:
    bound = cohort_bound({"still-a": 1e-9, "still-b": 1e-9, "honest-a": 1.0, "honest-b": 2.0}, 10.0)
    assert bound > 2.0


def test_two_clients_and_clients_that_stood_still_are_no_cohort() -> None:
    assert math.isinf(cohort_bound({"a": 1.0, "b": 1e9}, 10.0))
    assert math.isinf(cohort_bound({"a": 0.0, "b": 0.0, "c": 1.0}, 10.0))
    assert total({"x": 3.0, "y": 4.0}) == 5.0


SHARED = {"name": "fedftg", "rank": 3, "scale": 0.5, "subspace": "shared"}
PRIVACY = Declared(clip=0.5, noise=0.2, delta=1e-5, max_epsilon=8.0)


@pytest.mark.parametrize(("strategy", "entries"), [(FEDFTG, 120 * 90), (ROLORA, 120 * 90), (SHARED, 120 * 3)])
def test_declared_noise_widens_the_bound_by_its_own_length_and_no_more(
    strategy: dict[str, object], entries: int
) -> None:
    config, base = federation(strategy), {NAME: torch.zeros(120, 90)}
    bound = largest_change(NAME, base[NAME], 10, config.training, config.strategy)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(entries, generator=g, dtype=torch.float64).mul_(0.2)
    honest = {NAME: bound + float(noise.norm())}
    update = Update("site-b", 10, {})
    check_possible(update, honest, base, config.training, config.strategy, PRIVACY)
    with pytest.raises(RefusedUpdate, match="moved by"):
        check_possible(update, honest, base, config.training, config.strategy)
    beyond = {NAME: bound + 1.6 * float(noise.norm())}
    with pytest.raises(RefusedUpdate, match="steps and the declared noise"):
        check_possible(update, beyond, base, config.training, config.strategy, PRIVACY)


def test_noised_updates_neither_fail_the_cohort_nor_hide_a_wild_one() -> None:
    """Two that add noise a hundred times as long as what they learned, three that add none, one of them wild."""
    config, base = federation(ROLORA), {NAME: torch.zeros(500, 100)}
    privacy = Declared(clip=1.0, noise=0.5, delta=1e-5, max_epsilon=8.0)
    noised = math.hypot(0.8, 0.5 * math.sqrt(500 * 100))
    norms = {"a": 0.9, "b": 1.1, "wild": 50.0, "n1": noised, "n2": noised}
    declared = {"n1": privacy, "n2": privacy}
    moves = {
        k: update_size({NAME: n}, 10, base, config.training, config.strategy, declared.get(k)) for k, n in norms.items()
    }
    bound = cohort_bound({k: m.signal for k, m in moves.items()}, 10.0)
    assert {k for k, m in moves.items() if m.norm > bound + m.noise} == {"wild"}


def test_decay_is_not_clipped_so_it_counts_as_signal() -> None:
    config, base = federation(FEDFTG, weight_decay=0.5), {NAME: torch.ones(12, 9)}
    how_far = update_size({NAME: 100.0}, 10, base, config.training, config.strategy, PRIVACY)
    assert how_far.signal == pytest.approx(0.5 + 7 * 0.1 * 0.5 * math.sqrt(108))
