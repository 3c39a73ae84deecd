"""Updates in factors and steps under a Flower strategy, and how replies are folded."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import Message

import strategies
from common.errors import RefusedUpdate
from common.protocol import wire
from common.protocol.factors import Exchange, Factors, pack
from common.protocol.messages import TrainReply
from strategies.flower.clients import Client
from strategies.rule import Update
from tests.harness.rounds import lora, trained
from tests.strategies.test_flower import Nodes, answer, ask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_in_factors_is_averaged_as_the_weights_that_it_makes(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    state = {"up.weight": torch.randn(40, 24, generator=g).to(dtype)}
    strategy, changes, replies = strategies.FedFTG(), [], []
    for number, message in enumerate(ask(strategy, state), start=1):
        left, right = torch.randn(40, 2, generator=g), torch.randn(2, 24, generator=g)
        sent = pack("up.weight", Factors(0.9, [(left, right)]), state["up.weight"], Exchange())
        assert "up.weight/left" in sent
        replies.append(answer(message, sent, {"num-examples": number}))
        changes.append(0.9 * state["up.weight"].double() + left.double() @ right.double())
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    exact = (changes[0] + 2 * changes[1]) / 3
    got = wire.decode(arrays)["up.weight"]
    assert got.dtype == dtype
    wanted = exact if dtype == torch.float32 else exact.to(dtype).double()
    assert float((got.double() - wanted).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_factors_with_bad_values_are_refused_by_weight() -> None:
    strategy, state = strategies.FedFTG(), {"up.weight": torch.zeros(40, 24)}
    message = ask(strategy, state)[0]
    factors = Factors(1.0, [(torch.full((40, 2), float("nan")), torch.ones(2, 24))])
    bad = pack("up.weight", factors, state["up.weight"], Exchange())
    with pytest.raises(RefusedUpdate, match=r"node-1: up\.weight: 80 non-finite values in its factors"):
        strategy.read_update(answer(message, bad))
    with pytest.raises(RefusedUpdate, match=r"node-1: up\.weight: factors of shape .* do not fit"):
        strategy.read_update(answer(message, {**bad, "up.weight/left": torch.ones(39, 2)}))


def test_client_is_sent_steps_from_what_it_holds_and_everything_when_it_holds_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    state = {"up.weight": torch.randn(60, 40, generator=g)}
    strategy = strategies.FedFTG(min_train_nodes=1)
    strategy.begin(state)
    strategy.clients = {
        1: Client("warm", has_base=True),
        2: Client("forgets", has_base=True),
        3: Client("plain"),
    }
    for server_round in (1, 2, 3):
        warm, forgets, plain = (needs for _, needs in strategy.train_states(server_round, state, [1, 2, 3]))
        assert set(wire.decode(plain.arrays)) == {"up.weight"}
        assert plain.since is None
        for needs in (warm, forgets):
            assert not needs.arrays
            assert needs.version == plain.version
        assert list(warm.steps) == ([] if server_round == 1 else [server_round - 1])
        assert list(forgets.steps) == list(range(1, server_round))
        factors = Factors(1.0, [(torch.randn(60, 2, generator=g), torch.randn(2, 40, generator=g))])
        sent = wire.encode(pack("up.weight", factors, state["up.weight"], Exchange()))
        updates = []
        for node_id, version in ((1, warm.version), (2, None), (3, None)):
            reply = TrainReply(server_round=server_round, arrays=sent, num_examples=3, version=version)
            updates.append(strategy.admit(reply, node_id))
        state = strategy.combine(server_round, state, iter(updates)).state
    ((_, lost),) = strategy.train_states(4, state, [1])
    assert list(lost.steps) == [3]
    strategy.client(1).forget()  # as after an error
    ((_, again),) = strategy.train_states(4, state, [1])
    assert list(again.steps) == [1, 2, 3]
    # A state that came about otherwise has no steps.
    ((_, other),) = strategy.train_states(4, {name: t.clone() for name, t in state.items()}, [1])
    assert set(wire.decode(other.arrays)) == {"up.weight"}


class Clients(Nodes):
    """A grid whose nodes answer one after the other, only when asked; counts what is left of earlier replies."""

    def __init__(self, replies: Callable[[Message], Message], *ids: int) -> None:
        super().__init__(*ids)
        self._replies, self._open = replies, dict[str, Message]()
        self.watched, self.left = list[Any](), 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._open = {str(i): message for i, message in enumerate(messages)}
        return list(self._open)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        self.left = max(self.left, sum(ref() is not None for ref in self.watched))
        reply = self._replies(self._open[message_id])
        self.watched.append(weakref.ref(reply.content["arrays"]))
        return [reply]


@pytest.mark.parametrize("name", ["FedFTG", "FFALoRA", "RoLoRA"])
def test_replies_are_folded_and_dropped_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a reply or its update is left when the next is asked for; the result is that of collecting them."""
    state = lora(2, 0, head=False)
    strategy = getattr(strategies, name)(fraction_evaluate=0.0, min_train_nodes=20, min_available_nodes=20)

    def reply(message: Message) -> Message:
        number = int(message.metadata.dst_node_id)
        frozen = message.content.config_records["config"].get("frozen-digest")
        return answer(
            message,
            trained(strategy.rule, 1, state, number),
            {"num-examples": number},
            {"frozen-digest": str(frozen)} if frozen else {},
        )

    grid, read = Clients(reply, *range(1, 21)), strategy.read_update

    def watched(message: Message) -> Update:
        update: Update = read(message)
        grid.watched.extend(map(weakref.ref, update.tensors.values()))
        return update

    monkeypatch.setattr(strategy, "read_update", watched)
    result = strategy.start(grid, wire.encode(state), num_rounds=1)
    assert len(grid.watched) > 20
    assert grid.left == 0
    other = getattr(strategies, name)(min_train_nodes=20, min_available_nodes=20)
    collected, _ = other.aggregate_train(1, [reply(m) for m in ask(other, state, nodes=tuple(range(1, 21)))])
    assert collected is not None
    for key, tensor in wire.decode(result.arrays).items():
        torch.testing.assert_close(tensor, wire.decode(collected)[key], rtol=1e-5, atol=1e-6)  # the order differs
