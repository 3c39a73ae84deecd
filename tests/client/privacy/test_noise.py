"""Clipping, noise and their cost, against independent computations."""

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chi2, kstest
from torch import Tensor

from client.privacy.noise import gaussian, private
from client.session import Session
from client.update import factored_weights, trained_tensors
from common.accountant import cost, epsilon
from common.config.site import PrivacyConfig
from common.errors import TrainingError
from common.linalg.subspace import projects_right
from common.protocol.factors import Exchange, Factors, unpack
from common.protocol.messages import Declared
from strategies.admission.bounds import longest_noise
from tests.client.test_session import LORA, session, state

DELTA = 1e-5


def section(clip: float = 1.0, noise_multiplier: float = 1e-9, max_epsilon: float = 1e9) -> PrivacyConfig:
    return PrivacyConfig(clip=clip, noise_multiplier=noise_multiplier, delta=DELTA, max_epsilon=max_epsilon)


def total(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_all_tensors_are_clipped_together_and_keep_their_direction(shapes: list[tuple[int, int]], clip: float) -> None:
    changes = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    clipped = private(changes, section(clip))
    norm = total(changes)
    assert total(clipped) <= clip * (1 + 1e-6)
    assert total(clipped) == pytest.approx(min(norm, clip), rel=1e-5)
    for name, change in changes.items():
        torch.testing.assert_close(clipped[name], change * min(1.0, clip / norm), rtol=1e-4, atol=1e-5 * clip)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random bytes in every run of a test, whose tolerance chance must not decide."""
    monkeypatch.setattr("client.privacy.noise.os.urandom", Random(0).randbytes)


def test_noise_is_gaussian_of_the_declared_size_and_new_every_time() -> None:
    config = section(clip=0.5, noise_multiplier=3.0)
    changes = {"a": torch.full((300, 400), 1e-3), "b": torch.full((70_001,), -2e-3)}
    one, two = private(changes, config), private(changes, config)
    kept = min(1.0, 0.5 / total(changes))
    drawn = [torch.cat([(p[n] - kept * changes[n]).flatten() for n in changes]) for p in (one, two)]
    for noise in drawn:
        assert kstest((noise / 1.5).numpy(), "norm").pvalue > 1e-6
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 5 / math.sqrt(drawn[0].numel())
    assert all(t.dtype == torch.float32 for t in one.values())


def test_noise_owes_nothing_to_torchs_or_numpys_seed() -> None:
    torch.manual_seed(7)
    one = gaussian(8)
    torch.manual_seed(7)
    assert not torch.equal(one, gaussian(8))


def test_noised_numbers_lie_on_a_grid_that_does_not_depend_on_the_update() -> None:
    step = 2.0**-21  # noise 0.75: 2^-1 times 2^-20
    for size in (1e-7, 0.3):
        noised = private({"a": torch.full((5000,), size)}, section(clip=1.0, noise_multiplier=0.75))["a"].double()
        assert torch.equal(noised, (noised / step).round() * step)


def test_update_that_is_not_finite_is_refused() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        private({"a": torch.tensor([1.0, math.inf])}, section())


@pytest.mark.parametrize("multiplier", [0.8, 2.0, 8.0])
@pytest.mark.parametrize("rounds", [1, 10])
def test_epsilon_is_just_below_that_of_opacus_renyi_accountant(multiplier: float, rounds: int) -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(multiplier / 2, 1.0, rounds)]  # sensitivity 2 clip
    bound = accountant.get_epsilon(DELTA)
    ours = epsilon(rounds * cost(multiplier), DELTA)
    assert 0.75 * bound < ours <= bound


def test_epsilon_gives_delta_back_by_simulating_the_privacy_loss() -> None:
    """The definition: E max(0, 1 - exp(eps - L)), with L the log-likelihood ratio of the two farthest updates."""
    multiplier, rounds, delta = 4.0, 3, 1e-2
    eps = epsilon(rounds * cost(multiplier), delta)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2_000_000, rounds, generator=g, dtype=torch.float64) * multiplier  # in units of clip
    loss = (((noise - 2.0) ** 2).sum(1) - (noise**2).sum(1)).neg() / (2 * multiplier**2)  # outputs at -1 against +1
    loss = -loss  # of outputs drawn under the first
    simulated = float((1 - torch.exp(eps - loss)).clamp_min(0).mean())
    assert simulated == pytest.approx(delta, rel=0.03)


def test_epsilon_of_a_published_pair() -> None:
    """Balle and Wang (arXiv 1805.06530) at sensitivity 1 and delta 1e-5: epsilon 1 needs sigma 3.730632."""
    assert epsilon((1 / 3.730632) ** 2, 1e-5) == pytest.approx(1.0, rel=1e-3)


def test_epsilon_of_next_to_nothing_and_of_too_much() -> None:
    assert epsilon(0.0, DELTA) == epsilon(1e-14, DELTA) == 0.0
    assert epsilon(1e5, DELTA) == math.inf


@pytest.mark.parametrize("entries", [1, 30, 10_000, 10**8])
def test_bound_on_the_noise_holds_with_the_tail_of_chi_square(entries: int) -> None:
    bound = longest_noise(entries, 0.5)
    exact = 0.5 * math.sqrt(chi2.isf(1e-12, entries))
    assert exact <= bound <= 1.3 * exact


def galore_change(shape: tuple[int, int], exchange: Exchange, terms: int) -> Factors:
    """What GaLore makes: one term for every basis used."""
    pairs = []
    for _ in range(terms):
        right = projects_right(shape)
        basis = exchange.basis("w", shape) if exchange.basis else torch.linalg.qr(torch.randn(min(shape), 3)).Q
        basis = basis if exchange.basis or not right else basis.T
        pairs.append((torch.randn(shape[0], 3), basis) if right else (basis, torch.randn(3, shape[1])))
    return Factors(0.99, pairs, common=exchange.basis is not None)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_shared_basis_stays_factored_and_is_clipped_as_the_dense_change_would_be(
    shape: tuple[int, int], clip: float
) -> None:
    exchange, start = Exchange.of_round(3, "float32", (0, 3)), {"w": torch.randn(shape)}
    change = galore_change(shape, exchange, 1)
    update = factored_weights({"w": change}, {}, start, exchange, section(clip))
    whole, factors = unpack(update.tensors, {"w": shape}, exchange)
    assert not whole
    dense = change.terms[0][0].double() @ change.terms[0][1].double()
    expected = 0.99 * start["w"].double() + dense * min(1.0, clip / float(dense.norm()))
    torch.testing.assert_close(factors["w"].apply(start["w"]).double(), expected, rtol=1e-4, atol=1e-4)
    assert update.norm == pytest.approx(float((expected - start["w"]).norm()), rel=1e-3)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("shape", [(400, 24), (24, 400)])
def test_noise_in_the_shared_basis_is_what_travels(shape: tuple[int, int]) -> None:
    exchange, start = Exchange.of_round(3, "float32", (0, 3)), {"w": torch.zeros(shape)}
    config = section(clip=1.0, noise_multiplier=2.0)
    update = factored_weights({"w": galore_change(shape, exchange, 1)}, {}, start, exchange, config)
    (numbers,) = [t for name, t in update.tensors.items() if name != "w/decay"]
    assert numbers.numel() == 3 * 400
    assert float(numbers.std()) == pytest.approx(2.0, rel=0.1)
    nothing = factored_weights({"w": Factors(1.0, [])}, {}, start, exchange, config)  # a weight without a gradient
    (noise,) = [t for name, t in nothing.tensors.items() if name != "w/decay"]
    assert float(noise.std()) == pytest.approx(2.0, rel=0.1)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_own_bases_never_leave_the_change_travels_whole_with_noise_in_every_direction(shape: tuple[int, int]) -> None:
    exchange, start = Exchange(), {"w": torch.randn(shape)}
    change = galore_change(shape, exchange, 2)
    update = factored_weights({"w": change}, {}, start, exchange, section(clip=1.0, noise_multiplier=0.5))
    assert list(update.tensors) == ["w"]
    dense = sum(a.double() @ b.double() for a, b in change.terms)
    clipped = dense / max(1.0, float(dense.norm()))  # type: ignore[union-attr, arg-type]
    noise = update.tensors["w"].double() - 0.99 * start["w"].double() - clipped
    assert float(noise.std()) == pytest.approx(0.5, rel=0.15)
    assert torch.linalg.matrix_rank(noise) == min(shape)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("basis", [None, (0, 3)], ids=["own", "shared"])
@pytest.mark.parametrize("noise", [1e-5, 2.0])
def test_tensors_beside_the_factors_are_clipped_and_noised_with_them(
    basis: tuple[int, int] | None, noise: float
) -> None:
    exchange, start = Exchange.of_round(3, "float32", basis), {"w": torch.zeros(40, 24), "head": torch.ones(60, 20)}
    change, head = galore_change((40, 24), exchange, 1), torch.randn(60, 20) + 1.0
    update = factored_weights({"w": change}, {"head": head}, start, exchange, section(1.5, noise_multiplier=noise))
    whole, factors = unpack(update.tensors, {"w": (40, 24)}, exchange)
    moved = {"head": whole["head"] - 1.0, "w": factors["w"].change(start["w"]) if basis else whole["w"]}
    assert update.norm == pytest.approx(total(moved), rel=1e-4)
    if noise < 1:
        assert total(moved) == pytest.approx(1.5, rel=1e-3)
        exact = {"head": head - 1.0, "w": change.terms[0][0] @ change.terms[0][1]}
        for name, tensor in exact.items():
            torch.testing.assert_close(moved[name], tensor * 1.5 / total(exact), rtol=1e-3, atol=1e-3)
    else:
        assert float(moved["head"].std()) == pytest.approx(3.0, rel=0.1)


def test_without_privacy_whole_tensors_leave_bit_for_bit() -> None:
    trained, received = {"a": torch.randn(4, 3).bfloat16()}, {"a": torch.zeros(4, 3).bfloat16()}
    update = trained_tensors(trained, received, None)
    assert torch.equal(update.tensors["a"], trained["a"])
    assert update.norm == pytest.approx(total(trained))


PRIVATE = {"clip": 0.5, "noise_multiplier": 0.01, "delta": DELTA, "max_epsilon": 1e9}


def trained(folder: Path, site: dict[str, Any], **changes: Any) -> tuple[Session, dict[str, Tensor], dict[str, Tensor]]:
    """A session after one round: what it started from, and what it would send."""
    folder.mkdir(exist_ok=True)
    own = session(folder, site, **changes)
    before = state(own)
    active = [name for name in before if "lora_A" not in name] if "strategy" in changes else list(before)
    own.set_state(before, None, active)
    sent, _ = own.train(1, active)
    return own, before, sent


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("strategy", ["ffa-lora", "fedit"])
def test_lora_update_is_clipped_and_noised_against_what_came_in(tmp_path: Path, strategy: str) -> None:
    private_ = {"privacy": {**PRIVATE, "noise_multiplier": 0.05}}  # noise and clipped change are of like size
    own = session(tmp_path, private_, strategy={**LORA, "name": strategy}, training={"learning_rate": 1.0})
    before = state(own)
    active = [name for name in before if strategy == "fedit" or "lora_B" in name]
    own.set_state(before, None, active)
    sent, _ = own.train(1, active)
    moved = {name: sent[name] - before[name] for name in active}
    entries = sum(t.numel() for t in moved.values())
    assert total(moved) == pytest.approx(math.hypot(0.5, 0.025 * math.sqrt(entries)), rel=0.1)
    assert own.update_norm == pytest.approx(total(moved), rel=1e-4)


def test_private_site_evaluates_nothing_and_declares_its_noise(tmp_path: Path) -> None:
    own = session(tmp_path, {"privacy": PRIVATE})
    assert own.evaluate() == {}
    assert own.hello().privacy == Declared.of(own.site.privacy)  # type: ignore[arg-type]


@pytest.mark.usefixtures("same_noise")
def test_fedftg_of_a_private_site_sends_whole_weights(tmp_path: Path) -> None:
    own, before, sent = trained(tmp_path, {"privacy": PRIVATE})
    assert sent.keys() == before.keys()
    entries = sum(t.numel() for t in before.values())
    moved = total({name: sent[name] - before[name] for name in before})
    assert 0.9 * 0.005 * math.sqrt(entries) < moved <= 0.5 + longest_noise(entries, 0.005)
    assert own.update_norm == pytest.approx(moved, rel=1e-4)
