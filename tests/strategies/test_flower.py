"""The rules as Flower strategies: whom they ask, what they send, what they believe."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

import strategies
from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import AggregationError, RefusedUpdate
from common.protocol import wire
from common.protocol.digest import tensors_digest
from common.protocol.factors import Exchange, Factors, pack
from common.protocol.messages import TrainReply
from strategies.flora import FLoRARule
from strategies.flower.messages import Client
from strategies.flower.named import make_strategy
from strategies.flower.strategy import FlowerStrategy, sample, weighted_mean
from strategies.rule import Tensors, Update
from tests.harness.rounds import base_weights, lora, trained

A, B = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
WORDS = {
    "fedftg": "FedFTG",
    "flexlora": "FlexLoRA",
    "ffa-lora": "FFALoRA",
    "rolora": "RoLoRA",
    "fedit": "FedIT",
    "fedsa-lora": "FedSALoRA",
    "fedex-lora": "FedExLoRA",
    "flora": "FLoRA",
}
NAMES = tuple(WORDS.values())
NEEDS_ALPHA: dict[str, dict[str, float]] = {"FedExLoRA": {"lora_alpha": 16.0}, "FLoRA": {"lora_alpha": 16.0}}


@pytest.fixture(autouse=True)
def _within_a_run() -> Iterator[None]:
    """What the process of a ServerApp knows and Message asks for."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


class Nodes:
    """The one thing of a grid that strategies use."""

    def __init__(self, *ids: int) -> None:
        self._ids = ids

    def get_node_ids(self) -> Iterable[int]:
        return list(self._ids)


def ask(
    strategy: FlowerStrategy, state: Tensors, server_round: int = 1, nodes: tuple[int, ...] = (1, 2)
) -> list[Message]:
    config = ConfigRecord({"lr": 0.1})
    return list(strategy.configure_train(server_round, wire.encode(state), config, Nodes(*nodes)))  # type: ignore[arg-type]


def answer(
    message: Message,
    tensors: Tensors | None,
    metrics: dict[str, float] | None = None,
    config: dict[str, str] | None = None,
) -> Message:
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        "metrics": MetricRecord({"num-examples": 3, **(metrics or {})}),
        "config": ConfigRecord(dict(config or {})),
    }
    if tensors is not None:
        records["arrays"] = wire.encode(tensors)
    return Message(RecordDict(records), reply_to=message)


def failed(message: Message, reason: str) -> Message:
    return Message(Error(2, reason), reply_to=message)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_is_flowers_and_takes_fedavgs_options(name: str) -> None:
    def count(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"replies": len(contents)})

    strategy = getattr(strategies, name)(
        fraction_train=0.5,
        fraction_evaluate=0.5,
        min_train_nodes=3,
        min_evaluate_nodes=1,
        min_available_nodes=3,
        weighted_by_key="n",
        arrayrecord_key="tensors",
        configrecord_key="settings",
        train_metrics_aggr_fn=count,
        evaluate_metrics_aggr_fn=count,
        **NEEDS_ALPHA.get(name, {}),
    )
    assert isinstance(strategy, Strategy)
    assert isinstance(strategy, FedAvg)
    state = {n: t for n, t in lora(2, 0).items() if name != "FedSALoRA" or ".lora_B." not in n}
    (first, *_) = ask(strategy, state, nodes=(1, 2, 3, 4))
    assert set(first.content) == {"tensors", "settings"}


def test_federation_file_names_each_strategy_by_one_word() -> None:
    for word, name in WORDS.items():
        data = {
            "name": "x",
            "model": {"path": "m"},
            "strategy": word,
            "rounds": 1,
            "training": {"learning_rate": 0.1, "local_steps": 1},
        }
        made = make_strategy(parse(data, FederationConfig, "x").strategy, seed=0)
        assert type(made.rule) is type(getattr(strategies, name)(**NEEDS_ALPHA.get(name, {})).rule)


def test_messages_hold_round_active_names_and_the_callers_config_which_stays_as_it_was() -> None:
    config = ConfigRecord({"lr": 0.1})
    state = lora(2, 0, head=False)
    (message, _) = strategies.RoLoRA().configure_train(4, wire.encode(state), config, Nodes(1, 2))  # type: ignore[arg-type]
    sent = message.content.config_records["config"]
    assert sent["lr"] == 0.1
    assert sent["server-round"] == 4
    assert sent["active"] == [name for name in state if ".lora_A." in name]
    assert sent["frozen-digest"] == tensors_digest({name: t for name, t in state.items() if ".lora_B." in name})
    assert dict(config) == {"lr": 0.1}


def test_sampling_is_the_same_for_the_same_seed_and_round_and_leaves_the_global_generator_alone() -> None:
    nodes = list(range(100, 140))
    np_state, drawn = np.random.get_state()[1].copy(), sample(nodes, 0.25, 2, 7, 3)  # type: ignore[index]  # noqa: NPY002
    assert drawn == sample(nodes, 0.25, 2, 7, 3)
    assert len(drawn) == 10
    assert drawn != sample(nodes, 0.25, 2, 7, 4)
    assert drawn != sample(nodes, 0.25, 2, 8, 3)
    assert len(sample(nodes, 0.01, 5, 7, 3)) == 5
    assert (np.random.get_state()[1] == np_state).all()  # type: ignore[index]  # noqa: NPY002


def test_waiting_for_nodes_has_an_end() -> None:
    strategy = strategies.FedIT(join_timeout=0.0, min_available_nodes=3)
    with pytest.raises(AggregationError, match="2 of 3 nodes connected within 0 seconds"):
        ask(strategy, lora(2, 0))


def test_ffa_sends_a_once_to_clients_that_keep_it() -> None:
    strategy, state = strategies.FFALoRA(), lora(2, 0, head=False)
    for server_round in (1, 2, 3):
        messages = ask(strategy, state, server_round)
        sent = [set(wire.decode(m.content.array_records["arrays"])) for m in messages]
        b = {name for name in state if ".lora_B." in name}
        assert sent == ([set(state)] * 2 if server_round == 1 else [b] * 2)
        digest = str(messages[0].content.config_records["config"]["frozen-digest"])
        replies = [
            answer(m, trained(strategy.rule, server_round, state, k), config={"frozen-digest": digest})
            for k, m in enumerate(messages)
        ]
        arrays, _ = strategy.aggregate_train(server_round, replies)
        assert arrays is not None
        state = wire.decode(arrays)


def test_client_that_failed_is_sent_everything_again() -> None:
    strategy, state = strategies.FFALoRA(min_train_nodes=1), lora(2, 0, head=False)
    first = ask(strategy, state)
    digest = str(first[0].content.config_records["config"]["frozen-digest"])
    good = answer(first[0], trained(strategy.rule, 1, state, 0), config={"frozen-digest": digest})
    arrays, _ = strategy.aggregate_train(1, [good, failed(first[1], "out of memory")])
    assert arrays is not None
    kept, lost = ask(strategy, wire.decode(arrays), 2)
    assert set(wire.decode(kept.content.array_records["arrays"])) == {n for n in state if ".lora_B." in n}
    assert set(wire.decode(lost.content.array_records["arrays"])) == set(state)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, r"node-2: the reply holds neither the 3 frozen tensors nor their digest \('frozen-digest' in 'config'\)"),
        (
            {"frozen-digest": "0" * 64},
            r"node-2: its frozen tensors differ from the federation's \(digest 0{16}, expected",
        ),
    ],
)
def test_client_whose_frozen_factor_differs_is_refused_by_name(config: dict[str, str], says: str) -> None:
    strategy, state = strategies.FFALoRA(), lora(2, 0, head=False)
    message = ask(strategy, state)[1]
    with pytest.raises(RefusedUpdate, match=says):
        strategy.read_update(answer(message, trained(strategy.rule, 1, state, 0), config=config))


def test_refused_replies_are_left_out_and_too_few_end_the_round_with_their_reasons() -> None:
    strategy, state = strategies.FedIT(min_train_nodes=2), lora(2, 0)
    one, two, three = ask(strategy, state, nodes=(1, 2, 3))
    good = [answer(m, trained(strategy.rule, 1, state, k)) for k, m in enumerate((one, two))]
    bad = answer(three, {name: tensor * float("nan") for name, tensor in state.items()})
    with_bad, _ = strategy.aggregate_train(1, [*good, bad])
    ask(strategy, state, nodes=(1, 2, 3))
    without, _ = strategy.aggregate_train(1, good)
    assert with_bad is not None
    assert without is not None
    assert all(torch.equal(t, wire.decode(without)[n]) for n, t in wire.decode(with_bad).items())
    with pytest.raises(AggregationError, match=r"round 1: 1 admitted updates, 2 needed; node-3: .* non-finite values"):
        strategy.aggregate_train(1, [good[0], bad])
    with pytest.raises(AggregationError, match="round 1: 1 admitted updates, 2 needed; node-3: out of memory"):
        strategy.aggregate_train(1, [good[0], failed(three, "out of memory")])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_a_positive_number(alpha: float) -> None:
    strategy, state = strategies.FlexLoRA(16.0), lora(2, 0)
    message = ask(strategy, state)[0]
    with pytest.raises(RefusedUpdate, match=r"node-1: lora-alpha is .*; allowed: a positive number"):
        strategy.read_update(answer(message, state, {"lora-alpha": alpha}))


def test_alpha_other_than_the_federations_is_refused_where_it_must_be_common() -> None:
    state = lora(2, 0)
    for strategy in (strategies.FedIT(16.0), strategies.RoLoRA(16.0), strategies.FFALoRA(16.0)):
        message = ask(strategy, state)[0]
        with pytest.raises(RefusedUpdate, match=r"node-1: lora-alpha is 8\.0; the federation's is 16\.0"):
            strategy.read_update(answer(message, state, {"lora-alpha": 8.0}))


@pytest.mark.parametrize("strategy", [strategies.FlexLoRA(16.0), strategies.FLoRA(16.0)], ids=["flexlora", "flora"])
@pytest.mark.parametrize(
    ("alpha", "larger", "says"),
    [
        (5e-324, 1.0, r"lora-alpha is 5e-324; allowed: 1e-06 to 1e\+06"),
        (1e300, 1.0, r"lora-alpha is 1e\+300; allowed: 1e-06 to 1e\+06"),
        (1e6, 1e20, r"lora_A.weight: a norm of .*; allowed: up to 1e\+12"),
        (1e-6, 1.0, None),
        (1e6, 1e11, None),
    ],
)
def test_mixed_alphas_neither_crash_nor_poison(
    strategy: FlowerStrategy, alpha: float, larger: float, says: str | None
) -> None:
    rule = strategy.rule
    state = lora(2, 0) | (base_weights(0) if isinstance(rule, FLoRARule) else {})
    one, two = ask(strategy, state)
    wild = {name: tensor * larger for name, tensor in lora(2, 9).items()}
    frozen = {"frozen-digest": str(one.content.config_records["config"].get("frozen-digest", ""))}
    replies = [
        answer(one, lora(2, 8), {"lora-alpha": 8.0}, frozen),
        answer(two, wild, {"lora-alpha": alpha}, frozen),
    ]
    if says is not None:
        with pytest.raises(RefusedUpdate, match=f"node-2: .*{says}"):
            strategy.read_update(replies[1])
        return
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    state = wire.decode(arrays)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for message in ask(strategy, state, 2):
        sent = wire.decode(message.content.array_records["arrays"])
        assert all(torch.isfinite(tensor).all() for tensor in sent.values())


@pytest.mark.parametrize("told", [[None, 16.0], [16.0, None], [None, None]])
@pytest.mark.parametrize("name", ["FedIT", "FedFTG", "FedExLoRA"])
def test_client_that_tells_no_alpha_ends_no_round(name: str, told: list[float | None]) -> None:
    """Nor does one that tells one where there is none."""
    strategy = getattr(strategies, name)(**NEEDS_ALPHA.get(name, {}))
    state = lora(2, 0) | (base_weights(0) if name == "FedExLoRA" else {})
    messages = ask(strategy, state)
    frozen = {"frozen-digest": str(messages[0].content.config_records["config"].get("frozen-digest", ""))}
    replies = [
        answer(m, lora(2, k), {} if alpha is None else {"lora-alpha": alpha}, frozen)
        for k, (m, alpha) in enumerate(zip(messages, told, strict=True))
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    for key in lora(2, 0):
        torch.testing.assert_close(wire.decode(arrays)[key], (lora(2, 0)[key] + lora(2, 1)[key]) / 2)


def test_flexlora_sends_each_client_factors_of_the_rank_it_replied_with() -> None:
    strategy, state = strategies.FlexLoRA(16.0), lora(4, 0)
    one, two = ask(strategy, state)
    small = lora(2, 9)
    arrays, metrics = strategy.aggregate_train(
        1, [answer(one, lora(4, 8), {"lora-alpha": 16.0}), answer(two, small, {"lora-alpha": 6.0})]
    )
    assert arrays is not None
    assert metrics is not None
    assert any(key.startswith("truncation-loss/") for key in metrics)
    sent = [wire.decode(m.content.array_records["arrays"]) for m in ask(strategy, wire.decode(arrays), 2)]
    assert [s[A].shape[0] for s in sent] == [4, 2]
    assert [s[B].shape[1] for s in sent] == [4, 2]


def test_replies_that_cannot_be_read_are_refused() -> None:
    strategy, state = strategies.FedFTG(), lora(2, 0)
    message = ask(strategy, state)[0]
    with pytest.raises(RefusedUpdate, match="node-1: the reply has no 'arrays' record"):
        strategy.read_update(answer(message, None))
    for examples in (0, -15, 2.0, [7], float("nan")):
        with pytest.raises(RefusedUpdate, match=r"node-1: num-examples is .*; allowed: a whole number from 1"):
            strategy.read_update(answer(message, state, {"num-examples": examples}))  # type: ignore[dict-item]
    others = {"temperature": -3.5, "train.loss": -1.0}
    assert strategy.read_update(answer(message, state, others, {"version": "theirs"})).num_examples == 3
    pickled = answer(message, state)
    pickled.content["arrays"] = ArrayRecord({A: Array("float32", (1,), "pickle", b"\x80\x04.")})
    with pytest.raises(RefusedUpdate, match=r"node-1: .*lora_A"):
        strategy.read_update(pickled)


def test_metrics_are_weighted_by_examples_and_no_weight_turns_them_round() -> None:
    contents = [
        RecordDict({"metrics": MetricRecord({"num-examples": n, "loss": loss, **extra})})
        for n, loss, extra in ((1, 4.0, {}), (3, 2.0, {"only-here": 5.0}), (-15, 100.0, {}), (0, 100.0, {}))
    ]
    assert dict(weighted_mean(contents, "num-examples")) == {"loss": 2.5, "only-here": 5.0}


def test_nothing_is_asked_for_when_the_fraction_is_zero() -> None:
    strategy = strategies.FedIT(fraction_train=0.0, fraction_evaluate=0.0)
    assert ask(strategy, lora(2, 0)) == []
    assert strategy.aggregate_train(1, []) == (None, None)


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
