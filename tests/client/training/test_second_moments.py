"""Second moments that the federation averages: against float64, against a site that begins anew, and over the wire."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.session import Session
from client.training.galore import GaLore
from client.training.inner import SecondMoments
from common.errors import PolicyError, RefusedUpdate
from common.linalg.subspace import SharedBasis, projects_right
from common.model.second_moments import gathered, is_second_moment, name_of, spread
from common.protocol.factors import unpack
from server.loop.server_model import ServerModel
from strategies.admission.bounds import change_norms, check_possible, update_size
from strategies.flower.named import make_rule
from strategies.flower.versions import Versions
from strategies.rule import Update
from tests.client.privacy.test_guard import HELLO, PRIVATE, Site
from tests.client.test_session import session
from tests.client.training.test_galore import gradients, run, weight

SHAPES = [(12, 7), (7, 12), (9, 9)]
AVERAGED = {"name": "fedftg", "rank": 4, "subspace": "shared", "optimizer_state": "averaged"}


def galore(parameter: torch.nn.Parameter, basis: SharedBasis, known: Tensor, steps: int, **options: Any) -> GaLore:
    moments = SecondMoments({name_of("w"): known}, steps)
    base = {"lr": 0.02, "rank": 3, "update_proj_gap": 200, "scale": 0.7}
    return GaLore({"w": parameter}, basis=basis, second_moments=moments, **{**base, **options})


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_over_the_basis_estimates_another_basis_moments_without_bias(shape: tuple[int, int]) -> None:
    """Mean of (P g)^2 over 3,000 bases is |g|^2 / n, so last round's mean is an unbiased guess of this round's."""
    (gradient,) = gradients(shape, 1)
    found = []
    for server_round in range(3000):
        basis = SharedBasis(0, server_round, 3)("w", shape)
        low = gradient @ basis.T if projects_right(shape) else basis.T @ gradient
        found.append(gathered(low.square(), gradient.shape))
    expected = gradient.square().mean(1 if projects_right(shape) else 0)
    torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=0.06, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_second_round_goes_on_from_the_first_as_in_float64(shape: tuple[int, int]) -> None:
    first, second, grads = SharedBasis(0, 1, 3), SharedBasis(0, 2, 3), gradients(shape, 5)
    parameter = weight(shape)
    start = parameter.detach().double().numpy().copy()
    one = galore(parameter, first, torch.zeros(max(shape)), 0)
    run(parameter, one, grads[:3])
    known = one.second_moment("w")
    two = galore(parameter, second, known, 3)
    run(parameter, two, grads[3:])

    right, square, raw = projects_right(shape), 0.0, [g.double().numpy() for g in grads]
    for basis, steps in ((first, range(3)), (second, range(3, 5))):
        p, mean = basis("w", shape).double().numpy(), 0.0
        for number, step in enumerate(steps, start=1):
            low = raw[step] @ p.T if right else p.T @ raw[step]
            mean = 0.9 * mean + 0.1 * low
            square = 0.999 * square + 0.001 * low**2
            change = (mean / (1 - 0.9**number)) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
            start -= 0.02 * 0.7 * (change @ p if right else p @ change)
        axis = 1 if right else 0
        square = np.repeat(np.mean(square, axis, keepdims=True), 3, axis)  # what the next basis begins with
    np.testing.assert_allclose(parameter.detach().numpy(), start, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        two.second_moment("w").double(), torch.tensor(square.mean(axis) / (1 - 0.999**5)), rtol=1e-5, atol=0.0
    )


def test_with_nothing_known_it_is_plain_galore_and_an_idle_weight_passes_its_moment_on() -> None:
    basis, grads, known = SharedBasis(0, 1, 3), gradients((12, 7), 4), torch.rand(12)
    plain, mine = weight((12, 7)), weight((12, 7))
    run(plain, GaLore({"w": plain}, lr=0.02, rank=3, update_proj_gap=200, scale=0.7, basis=basis), grads)
    run(mine, galore(mine, basis, torch.zeros(12), 8), grads)
    assert torch.equal(plain, mine)
    assert galore(mine, basis, known, 8).second_moment("w") is known
    assert torch.equal(gathered(spread(known, mine.shape, 4), mine.shape), known)


def federation(folder: Path, rounds: int, **strategy: object) -> tuple[list[Session], Versions, list[Update]]:
    """Two sites after so many rounds, the versions, and the last updates."""
    folder.mkdir(exist_ok=True)
    changes: dict[str, Any] = {"strategy": AVERAGED | strategy}
    sites = [session(folder / "a", **changes), session(folder / "b", {"name": "site-b"}, **changes)]
    config = sites[0].federation
    state = ServerModel(config, folder / "a" / "federation.yaml").initial_state()
    rule, versions, updates = make_rule(config.strategy, seed=config.training.seed), Versions(state), []
    for server_round in range(1, rounds + 1):
        updates = []
        for number, own in enumerate(sites, start=1):
            assert own.weights is not None
            steps = versions.since(own.weights.version)
            assert steps is not None
            own.follow(steps, own.weights.version, versions.latest)
            sent, _ = own.train(server_round, rule.active(server_round, versions.state))
            shapes = {name: tuple(tensor.shape) for name, tensor in versions.state.items()}
            exchange = rule.exchange(server_round)
            assert exchange is not None
            whole, factors = unpack(sent, shapes, exchange)
            updates.append(Update(own.site.name, number, whole, None, factors))
        if server_round < rounds:
            versions.advance(rule.aggregate(server_round, versions.state, iter(updates)))
    return sites, versions, updates


def test_server_averages_what_sites_send_and_the_next_round_begins_with_it(tmp_path: Path) -> None:
    sites, versions, updates = federation(tmp_path, 1)
    rule = make_rule(sites[0].federation.strategy, seed=0)
    outcome = rule.aggregate(1, versions.state, iter(updates))
    moments = [name for name in versions.state if is_second_moment(name)]
    assert len(moments) == len(versions.state) / 2
    for name in moments:
        sent = [update.tensors[name] for update in updates]
        assert not versions.state[name].any()
        assert all((tensor > 0).all() for tensor in sent)
        torch.testing.assert_close(outcome.state[name], (sent[0] + 2 * sent[1]) / 3, rtol=1e-6, atol=0.0)
    assert not any("second_moment" in name for name in outcome.diagnostics)
    own = sites[0]
    assert own.weights is not None
    assert outcome.step is not None
    own.follow([outcome.step], own.weights.version, outcome.step.next(own.weights.version))
    begun = own.work(2, []).second_moments()
    assert begun is not None
    steps = own.federation.training.local_steps or math.nan
    assert begun.steps == steps
    assert all(torch.equal(begun.tensors[name], outcome.state[name]) for name in moments)
    late = session(tmp_path / "a", strategy=AVERAGED)
    late.set_state(outcome.state, None, [], "any", 1)  # all at once
    assert {n: t.tolist() for n, t in late.train(2, list(outcome.state))[0].items()} == {
        n: t.tolist() for n, t in own.train(2, list(outcome.state))[0].items()
    }


def test_rounds_differ_from_those_that_begin_anew_but_the_first(tmp_path: Path) -> None:
    for rounds, same in ((1, True), (2, False)):
        *_, averaged = federation(tmp_path / f"averaged-{rounds}", rounds)
        *_, anew = federation(tmp_path / f"anew-{rounds}", rounds, optimizer_state="reset")
        for name, factors in anew[0].factors.items():
            pairs = zip(factors.terms[0], averaged[0].factors[name].terms[0], strict=True)
            assert all(torch.equal(*pair) for pair in pairs) == same


def test_second_moments_that_no_training_gives_are_refused(tmp_path: Path) -> None:
    sites, versions, updates = federation(tmp_path, 2)
    config, update = sites[0].federation, updates[0]
    norms = change_norms(update, versions.state)
    check_possible(update, norms, versions.state, config.training, config.strategy)
    name = next(name for name in versions.state if is_second_moment(name))
    how_far = update_size(norms, 3, versions.state, config.training, config.strategy)
    assert config.training.max_grad_norm is not None
    for value, what in ((-1e-9, "has negative entries"), (config.training.max_grad_norm**2, "moved by")):
        tensors = {**update.tensors, name: torch.full_like(update.tensors[name], value)}
        bad = Update(update.client, update.num_examples, tensors, None, update.factors)
        norms = change_norms(bad, versions.state)
        with pytest.raises(RefusedUpdate, match=rf"{name} {what}"):
            check_possible(bad, norms, versions.state, config.training, config.strategy)
        assert update_size(norms, 3, versions.state, config.training, config.strategy) == how_far


def test_site_with_differential_privacy_refuses(tmp_path: Path) -> None:
    """Only the change of the weights carries noise."""
    asked = session(tmp_path, strategy=AVERAGED).federation
    with pytest.raises(PolicyError, match="`privacy` allows `optimizer_state` reset"):
        Site(tmp_path, privacy=PRIVATE).gate().check(asked, HELLO)
