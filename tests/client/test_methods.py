"""A site under the strategies that change base weights or leave B or moments to it, against the server's rule."""

from pathlib import Path
from typing import Any

import pytest
import torch

from client.preflight.traffic import bytes_per_round
from client.session import Session
from common.errors import ModelError
from common.model import tuning
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B
from common.protocol.factors import num_bytes, unpack
from common.protocol.tensors import Tensors
from server.loop.server_model import ServerModel
from server.run.outcome import Outcome
from strategies.admission.bounds import change_norms, check_possible
from strategies.flower.named import make_rule
from strategies.flower.versions import Versions
from strategies.rule import Update
from tests.client.test_session import session

LORA = {"rank": 4, "modules": "linear", "blocks": "lower half", "lora_alpha": 8.0}


def logits(own: Session) -> torch.Tensor:
    own._tuned.model.eval()
    with torch.no_grad():
        found: torch.Tensor = own._tuned.model(input_ids=torch.arange(5, 13)[None]).logits
    return found


@pytest.mark.parametrize("strategy", ["fedex-lora", "flora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sites_follow_the_server_from_the_base_model_for_three_rounds(
    tmp_path: Path, strategy: str, dtype: str
) -> None:
    """One site with the federation's rank, one capped where the strategy allows it."""
    changes: dict[str, Any] = {
        "strategy": {"name": strategy, **LORA},
        "model": {"path": "model", "dtype": dtype},
        "rounds": 3,
    }
    other: dict[str, Any] = {"name": "site-b"} | ({"max_rank": 2} if strategy == "flora" else {})
    sites = [session(tmp_path / "a", **changes), session(tmp_path / "b", other, **changes)]
    before = logits(sites[0])
    config = sites[0].federation
    server_model = ServerModel(config, tmp_path / "a" / "federation.yaml")
    rule, versions = make_rule(config.strategy, seed=config.training.seed), Versions(server_model.initial_state())
    base = {name: tensor for name, tensor in versions.state.items() if name.endswith(BASE_WEIGHT)}
    assert base
    for server_round in (1, 2, 3):
        state, updates = versions.state, []
        active = rule.active(server_round, state)
        for own in sites:
            weights = own.weights
            assert weights is not None
            steps = versions.since(weights.version)
            assert steps is not None
            own.follow(steps, weights.version, versions.latest)
            assert all(torch.equal(tensor, weights.tensors[name]) for name, tensor in state.items())
            trained, _ = own.train(server_round, active)
            assert trained.keys() == set(active)
            assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
            held = own._tuned.get()
            assert all(torch.equal(held[n], state[n].to(held[n].dtype)) for n in base)  # frozen while A and B train
            updates.append(Update(own.site.name, 3, trained, own.lora_alpha))
        versions.advance(rule.aggregate(server_round, state, iter(updates)))
    assert all(not torch.equal(versions.state[name], tensor) for name, tensor in base.items())
    first, weights, late = sites[0], sites[0].weights, session(tmp_path / "a", **changes)
    assert weights is not None
    first.follow(versions.since(weights.version) or [], weights.version, versions.latest)
    late.set_state(rule.state_for(versions.state, 4, 8.0), None, [], versions.latest, 3)  # all at once
    assert torch.equal(logits(late), logits(sites[0]))
    assert not torch.allclose(before, logits(late))
    server_model.export(versions.state, tmp_path / "model", server_model.card(versions.state, Outcome(1, sites=2)))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    exported = model(input_ids=torch.arange(5, 13)[None]).logits.detach()
    torch.testing.assert_close(exported, logits(late).float(), rtol=tolerance, atol=tolerance)


def test_sites_of_smaller_rank_are_refused_where_ranks_must_be_equal(tmp_path: Path) -> None:
    own = session(tmp_path, {"max_rank": 2}, strategy={"name": "fedex-lora", **LORA})
    with pytest.raises(ModelError, match="only flexlora and flora allow mixed ones"):
        own.hello()


def test_weights_that_are_kept_transposed_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))
    config = session(tmp_path, strategy={"name": "flora", **LORA}).federation.strategy
    with pytest.raises(ModelError, match=r"c_attn.weight is kept as \(in, out\)"):
        tuning.tune(model, config, "CAUSAL_LM")


def test_fedsas_b_stays_at_the_site_and_is_trained_on(tmp_path: Path) -> None:
    own = session(tmp_path, strategy={"name": "fedsa-lora", **LORA}, evaluation={"server": None})
    state = own._tuned.get()
    assert state
    assert all(name.endswith(LORA_A) for name in state)
    own.set_state(state, None, list(state))
    plain = logits(own)
    trained, _ = own.train(1, list(state))
    assert trained.keys() == state.keys()
    kept: Tensors = own.kept
    assert {name for name in kept if name.endswith(LORA_B)} == {n.removesuffix(LORA_A) + LORA_B for n in state}
    assert all(tensor.any() for tensor in kept.values())
    after = logits(own)
    assert not torch.allclose(after, plain)
    other = session(tmp_path, strategy={"name": "fedsa-lora", **LORA}, evaluation={"server": None})
    other.kept = kept  # as the caller carries it over to a new process
    other.set_state(trained, None, list(state), after=1)
    assert torch.equal(logits(other), after)


@pytest.mark.parametrize(
    "strategy",
    [
        {"projection": "none"},
        {"projection": "none", "optimizer_state": "keep"},
        {"rank": 4, "update_proj_gap": 2, "scale": 1.0, "optimizer_state": "keep"},
    ],
)
def test_fedftg_sends_what_was_counted_and_goes_on_with_what_it_kept(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """Two rounds at one site, the second one also in a new process that was given what the site had kept."""
    whole, updates = strategy.get("projection") == "none", []
    own = session(tmp_path, strategy={"name": "fedftg", "blocks": "lower half", **strategy})
    config = own.federation
    rule = make_rule(config.strategy, seed=config.training.seed)
    versions = Versions({name: tensor.clone() for name, tensor in own.exchanged.items()})
    active = rule.active(1, versions.state)
    for server_round in (1, 2):
        kept, weights = dict(own.kept), own.weights
        assert weights is not None
        steps = versions.since(weights.version)
        if steps is None:  # they would be as large as the weights
            own.set_state(dict(versions.state), None, active, versions.latest, server_round - 1)
        else:
            own.follow(steps, weights.version, versions.latest)
        sent, _ = own.train(server_round, active)
        assert (sent.keys() == set(active)) == whole
        assert num_bytes(sent.values()) <= own.work(server_round, active).most_bytes()
        if whole:
            assert num_bytes(sent.values()) == own.work(server_round, active).most_bytes()
            assert num_bytes(sent.values()) == bytes_per_round(config, dict(own._tuned.parameters), 3)[1]
        shapes = {name: tuple(tensor.shape) for name, tensor in versions.state.items()}
        dense, factors = unpack(sent, shapes, config.strategy.exchange(0, server_round))
        update = Update("site-a", 9, dense, None, factors)
        check_possible(update, change_norms(update, versions.state), versions.state, config.training, config.strategy)
        updates.append((versions, kept, sent))
        if server_round == 1:
            versions.advance(rule.aggregate(server_round, versions.state, iter([update])))
    assert bool(own.kept) == (strategy.get("optimizer_state") == "keep")
    late = session(tmp_path, strategy={"name": "fedftg", "blocks": "lower half", **strategy})
    late.kept = updates[1][1]
    late.set_state(dict(versions.state), None, active, versions.latest, 1)
    again, _ = late.train(2, active)
    assert all(torch.equal(again[name], tensor) for name, tensor in updates[1][2].items())
