"""FedFTG's averages as steps: exact against float64, small on the wire, and the same at whoever takes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from client.held_weights import Weights
from common.errors import StaleStateError
from common.linalg.subspace import SharedBasis
from common.protocol.factors import Exchange, Factors, num_bytes
from common.protocol.versions import Step
from strategies.fedftg import FedFTGRule
from strategies.flower.versions import Versions
from strategies.rule import RoundResult, Tensors, Update
from tests.harness.rounds import aggregate, close, doubles

SHAPES = {"model.layers.0.up.weight": (60, 40), "model.layers.0.down.weight": (40, 60)}
SHARED = (7, 2)  # seed and rank


def base(seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def changes(
    rule: FedFTGRule, server_round: int, seed: int, *, refreshes: int = 1, size: float = 0.1
) -> dict[str, Factors]:
    """A client's change in each weight: bases of rank 2, its own or the round's."""
    g, basis = torch.Generator().manual_seed(seed), rule.exchange(server_round).basis
    made = {}
    for name, shape in SHAPES.items():
        right = shape[0] >= shape[1]
        terms = []
        for _ in range(1 if basis is not None else refreshes):
            p = basis(name, shape) if basis is not None else torch.randn((2, 40) if right else (40, 2), generator=g)
            r = size * torch.randn((60, 2) if right else (2, 60), generator=g)
            terms.append((r, p) if right else (p, r))
        made[name] = Factors(1.0 - 0.01 * (seed % 3), terms, common=basis is not None)
    return made


def exact(state: Tensors, updates: list[Update]) -> dict[str, np.ndarray]:
    """Direct averaging of the clients' weights in float64."""
    total = sum(u.num_examples for u in updates)
    result = {}
    for name, start in doubles(state).items():
        whole = [
            u.factors[name].decay * start
            + sum(a.double().numpy() @ b.double().numpy() for a, b in u.factors[name].terms)
            if name in u.factors
            else u.tensors[name].double().numpy()
            for u in updates
        ]
        result[name] = sum(u.num_examples / total * w for u, w in zip(updates, whole, strict=True))
    return result


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 10**5), min_size=1, max_size=20),
    st.sampled_from([None, SHARED]),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_average_of_factors_is_direct_averaging_in_any_order(
    examples: list[int], shared: tuple[int, int] | None, refreshes: int, seed: int
) -> None:
    rule, state = FedFTGRule(shared=shared), base(seed)
    updates = [
        Update(f"c{k}", n, {}, None, changes(rule, 3, seed + k, refreshes=refreshes)) for k, n in enumerate(examples)
    ]
    wanted = exact(state, updates)
    for order in (updates, updates[::-1]):
        got = aggregate(rule, 3, state, order)
        assert got.step is not None
        for name in state:
            moved = wanted[name] - doubles(state)[name]
            assert np.linalg.norm(doubles(got.state)[name] - wanted[name]) <= 1e-5 * np.linalg.norm(moved)
        # All columns together are smaller than the weight, or it travels whole; a shared basis never adds columns.
        columns = 2 * (1 if shared else len(examples) * refreshes)
        whole = not shared and columns * 100 * 4 + 8 >= 60 * 40 * 4
        assert (SHAPES.keys() <= got.step.tensors.keys()) == whole


def test_some_whole_and_some_in_factors_average_together() -> None:
    rule, state = FedFTGRule(), base()
    moved = {name: tensor + 0.1 for name, tensor in state.items()}
    updates = [
        Update("a", 3, {}, None, changes(rule, 1, 1)),
        Update("b", 5, moved),
        Update("c", 2, {}, None, changes(rule, 1, 2)),
    ]
    for order in (updates, updates[::-1]):
        got = doubles(aggregate(rule, 1, state, order).state)
        assert all(close(got[name], wanted) for name, wanted in exact(state, updates).items())


def test_factors_and_the_weights_they_make_drift_alike() -> None:
    rule, state = FedFTGRule(), base()
    in_factors = [Update(f"c{k}", 1 + k, {}, None, changes(rule, 1, k)) for k in range(3)]
    whole = [Update(u.client, u.num_examples, {n: f.apply(state[n]) for n, f in u.factors.items()}) for u in in_factors]
    a, b = (aggregate(rule, 1, state, updates).diagnostics for updates in (in_factors, whole))
    assert a == pytest.approx(b, rel=1e-3)
    assert set(a) == {"client-norm/model.layers.0", "client-cosine/model.layers.0"}


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("shared", [None, SHARED])
def test_rounded_average_is_what_its_receivers_have_too_and_its_error_is_reported(
    precision: str, shared: tuple[int, int] | None
) -> None:
    rule, state = FedFTGRule(precision, shared), base()  # type: ignore[arg-type]
    updates = [Update(f"c{k}", 1 + k, {}, None, changes(rule, 1, 3 * k)) for k in range(3)]
    outcome = aggregate(rule, 1, state, updates)
    assert outcome.step is not None
    assert all(torch.equal(t, outcome.state[n]) for n, t in outcome.step.apply(state, rule.exchange(1)).items())
    wanted = exact(state, updates)
    lost = sum(np.linalg.norm(doubles(outcome.state)[n] - wanted[n]) ** 2 for n in state)
    moved = sum(np.linalg.norm(wanted[n] - doubles(state)[n]) ** 2 for n in state)
    assert outcome.diagnostics["wire-error/mean"] == pytest.approx(np.sqrt(lost / moved), rel=0.02)


def rounds(rule: FedFTGRule, versions: Versions, first: int, last: int) -> list[RoundResult]:
    made = []
    for number in range(first, last + 1):
        updates = [Update(f"c{k}", 1 + k, {}, None, changes(rule, number, 10 * number + k)) for k in range(2)]
        made.append(aggregate(rule, number, versions.state, updates))
        versions.advance(made[-1])
    return made


@pytest.mark.parametrize("shared", [None, SHARED])
def test_site_that_follows_the_steps_holds_the_servers_state_bit_for_bit(shared: tuple[int, int] | None) -> None:
    rule = FedFTGRule(shared=shared)
    versions, always, late = Versions(base()), Weights(base(), rule.exchange), Weights(base(), rule.exchange)
    assert always.version == versions.first == versions.latest
    for number in range(1, 4):
        rounds(rule, versions, number, number)
        steps = versions.since(always.version)
        assert steps is not None
        assert len(steps) == 1
        always.follow(steps, always.version, versions.latest)
        always.follow(steps, "whatever", versions.latest)  # held already: nothing happens
        assert all(torch.equal(t, always.tensors[n]) for n, t in versions.state.items())
    steps = versions.since(late.version)
    assert steps is not None
    assert [s.server_round for s in steps] == [1, 2, 3]
    late.follow(steps, late.version, versions.latest)
    assert all(torch.equal(t, late.tensors[n]) for n, t in versions.state.items())
    assert late.steps == always.steps


def test_steps_are_forgotten_once_they_are_no_smaller_than_the_state() -> None:
    rule, versions = FedFTGRule(), Versions(base())
    held, site = [versions.latest], Weights(base(), rule.exchange)
    for number in range(1, 13):
        rounds(rule, versions, number, number)
        held.append(versions.latest)
        whole = num_bytes(versions.state.values())
        for version in held:
            steps = versions.since(version)
            assert steps is None or sum(s.num_bytes for s in steps) < whole
    known = [versions.since(version) is not None for version in held]
    assert known == sorted(known)  # the oldest are forgotten first
    assert not known[0]
    assert len(versions.since(held[-2]) or []) == 1
    site.replace(versions.state, versions.latest)
    assert site.steps is None
    assert site.version == versions.latest


def test_all_steps_are_kept_where_no_site_takes_whole_weights() -> None:
    rule, versions, late = FedFTGRule(), Versions(base()), Weights(base(), FedFTGRule().exchange)
    versions.keep_all = True
    rounds(rule, versions, 1, 12)
    steps = versions.since(versions.first)
    assert steps is not None
    assert sum(step.num_bytes for step in steps) > num_bytes(versions.state.values())
    late.follow(steps, late.version, versions.latest)
    assert all(torch.equal(t, late.tensors[n]) for n, t in versions.state.items())


def test_a_version_is_proven_by_steps_or_by_its_digest_and_not_by_a_word() -> None:
    rule, versions, site = FedFTGRule(), Versions(base()), Weights(base(), FedFTGRule().exchange)
    rounds(rule, versions, 1, 1)
    site.follow(versions.since(site.version) or [], site.version, versions.latest)
    assert site.proven
    site.replace(versions.state, versions.latest)  # as they are, but nothing says so
    assert not site.proven
    rounds(rule, versions, 2, 2)
    site.follow(versions.since(site.version) or [], site.version, versions.latest)
    assert (site.version, site.proven) == (versions.latest, False)
    site.replace(base(1), Versions(base(1)).first)
    assert site.proven
    site.replace(base(2), site.version)
    assert not site.proven


def test_site_that_holds_something_else_says_so_and_keeps_what_it_has() -> None:
    rule, versions, site = FedFTGRule(), Versions(base()), Weights(base(), FedFTGRule().exchange)
    rounds(rule, versions, 1, 2)
    before, version = dict(site.tensors), site.version
    (step,) = (versions.since(versions.latest) or [Step(2, {})])[-1:] or [Step(2, {})]
    for steps, since, target in (
        ([step], "another", versions.latest),  # from a version that is not held
        ([], site.version, versions.latest),  # a step is missing
        ([Step(1, {})], site.version, versions.latest),  # another step
    ):
        with pytest.raises(StaleStateError, match="this site holds version"):
            site.follow(steps, since, target)
    assert site.version == version
    assert all(torch.equal(t, before[n]) for n, t in site.tensors.items())


def test_versions_differ_when_anything_differs() -> None:
    a, b = Step(1, {"w": torch.zeros(2)}), Step(1, {"w": torch.ones(2)})
    names = {a.next("x"), b.next("x"), a.next("y"), Step(2, a.tensors).next("x")}
    assert len(names) == 4
    assert Versions(base(0)).first != Versions(base(1)).first


def test_exchange_of_another_seed_makes_another_state() -> None:
    """What a shared basis is worth depends on both sides drawing the same."""
    rule, state = FedFTGRule(shared=SHARED), base()
    outcome = aggregate(rule, 1, state, [Update("a", 1, {}, None, changes(rule, 1, 3))])
    assert outcome.step is not None
    other = outcome.step.apply(state, Exchange(basis=SharedBasis(8, 1, 2)))
    assert not any(torch.equal(other[name], outcome.state[name]) for name in state)
