"""The rules as Flower strategies: whom they ask, what they send, what they believe."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

import strategies
from common.config.federation import FederationConfig
from common.config.load import parse
from common.errors import AggregationError, RefusedUpdate
from common.protocol import wire
from common.protocol.digest import tensors_digest
from strategies.flower.named import make_strategy
from strategies.flower.strategy import FlowerStrategy, sample, weighted_mean
from strategies.rule import Tensors
from tests.harness.rounds import lora, trained

A, B = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
WORDS = {
    "fedftg": "FedFTG",
    "flexlora": "FlexLoRA",
    "ffa-lora": "FFALoRA",
    "fedsvd": "FedSVD",
    "rolora": "RoLoRA",
    "fedit": "FedIT",
    "fedsa-lora": "FedSALoRA",
    "fedex-lora": "FedExLoRA",
    "flora": "FLoRA",
}
NAMES = tuple(WORDS.values())
NEEDS_ALPHA: dict[str, dict[str, float]] = {"FedExLoRA": {"lora_alpha": 16.0}, "FLoRA": {"lora_alpha": 16.0}}


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


LORA = tuple(name for name in NAMES if name != "FedFTG")


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({A: None, "q.lora_A.default.weight": (2, 8)}, r"q\.lora_A\.default\.weight is no factor that can be combined"),
        ({"e.lora_embedding_B": (8, 2)}, r"e\.lora_embedding_B is no factor that can be combined"),
        ({"q.lora_magnitude_vector": (8,)}, r"q\.lora_magnitude_vector is no factor that can be combined"),
        ({A: (2, 3, 3, 3)}, r"lora_A\.weight has shape \(2, 3, 3, 3\); allowed: factors of linear layers"),
    ],
)
def test_first_state_with_factors_that_are_not_known_as_such_is_refused(
    name: str, changes: dict[str, tuple[int, ...] | None], says: str
) -> None:
    strategy = getattr(strategies, name)(**NEEDS_ALPHA.get(name, {}))
    state = {A: torch.zeros(2, 8), B: torch.zeros(8, 2)} | {
        key: torch.zeros(shape) for key, shape in changes.items() if shape is not None
    }
    state = {key: tensor for key, tensor in state.items() if changes.get(key, ()) is not None}
    with pytest.raises(AggregationError, match=says):
        ask(strategy, state)


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
