"""Rounds that wait for no slow site, against sites whose updates arrive in a given order."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MessageType

from client.held_weights import Weights
from common.errors import FederationError, WorkerDied
from common.protocol import wire
from common.protocol.factors import Factors, pack
from common.protocol.messages import TrainReply
from server.run.folder import read_lines
from strategies.fedftg import FedFTGRule
from tests.harness.fake_sites import NAME, SHAPE, Clock, Ordered, Site, base, run

SHARED = FedFTGRule(shared=(0, 2))
SECTION = {"name": "fedftg", "rank": 2, "subspace": "shared"}


class SharedSite(Site):
    """A site that trains in the basis that all share in a round."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.weights = Weights(base(), SHARED.exchange)

    def _train(self, server_round: int) -> TrainReply:
        told, exchange = super()._train(server_round), SHARED.exchange(server_round)
        factors = Factors(1.0, [(self.left(server_round), basis_of(server_round))], common=True)
        packed = pack(NAME, factors, self.weights.tensors[NAME], exchange)
        return TrainReply(**{**vars(told), "arrays": wire.encode(packed)})

    def left(self, server_round: int) -> torch.Tensor:
        return torch.randn(60, 2, generator=torch.Generator().manual_seed(100 * self.number + server_round))


def basis_of(server_round: int) -> torch.Tensor:
    exchange = SHARED.exchange(server_round)
    assert exchange.basis is not None
    return exchange.basis(NAME, SHAPE)


ALL = {"min_clients": 2, "mode": "buffered", "size": 2, "max_age": 4}


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == kind]


def counted(tmp_path: Path) -> list[tuple[int, str, int]]:
    """Round, site and age of every update, in the order of arrival."""
    return [(e["round"], e["client"], e.get("age", 0)) for e in events(tmp_path, "reply")]


def buffered(
    tmp_path: Path, sites: Sequence[Site], order: Sequence[int], rounds: int, cohort: Any = None, **more: Any
) -> torch.Tensor:
    grid = Ordered(dict(enumerate(sites, start=1)), order)
    return run(tmp_path, sites, rounds, grid=grid, cohort=cohort or ALL, **more)[NAME]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FedBuff:
    """FedBuff in float64; a change depends on site and round alone."""

    def __init__(self, *, shared: bool = False) -> None:
        self.state, self.shared = base()[NAME].double().numpy(), shared
        self.since = {1: 1, 2: 1, 3: 1}

    def change(self, site: int, server_round: int) -> np.ndarray:
        g = torch.Generator().manual_seed(100 * site + server_round)
        left, right = torch.randn(60, 2, generator=g), torch.randn(2, 40, generator=g)
        right = basis_of(server_round) if self.shared else right
        return np.asarray(left.double().numpy() @ right.double().numpy())

    def round(self, number: int, came: Sequence[int]) -> None:
        rows = sum(came)  # a site has as many rows as its number
        for site in came:
            age = number - self.since[site]
            self.state = self.state + site / rows * (1 + age) ** -0.5 * self.change(site, self.since[site])
        self.since |= dict.fromkeys(came, number + 1)


ORDER = [(1, 2), (2, 1), (3, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("norm_ratio", [10.0, None])
def test_rounds_are_those_of_fedbuff(tmp_path: Path, norm_ratio: float | None) -> None:
    sites, oracle = [Site(1), Site(2), Site(3)], FedBuff()
    found = buffered(tmp_path, sites, flat(ORDER), len(ORDER), admission={"norm_ratio": norm_ratio, "rows_ratio": None})
    for number, came in enumerate(ORDER, start=1):
        oracle.round(number, came)
    assert np.allclose(found.double().numpy(), oracle.state, rtol=0, atol=2e-5)
    assert counted(tmp_path) == [
        *((1, "site-1", 0), (1, "site-2", 0), (2, "site-2", 0), (2, "site-1", 0), (3, "site-3", 2), (3, "site-1", 0)),
        *((4, "site-1", 0), (4, "site-2", 1), (5, "site-2", 0), (5, "site-3", 1)),
    ]
    ages = [r.get("age", 0) for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"]
    assert sorted(ages) == [0] * 7 + [1, 1, 2]
    assert not (tmp_path / "run" / "earlier").exists()


def test_updates_in_the_bases_of_several_rounds_add_up_and_every_site_can_follow(tmp_path: Path) -> None:
    sites, oracle = [SharedSite(1), SharedSite(2), SharedSite(3)], FedBuff(shared=True)
    more = {"strategy": SECTION, "admission": {"rows_ratio": None}}
    found = buffered(tmp_path, sites, flat(ORDER), len(ORDER), **more)
    for number, came in enumerate(ORDER, start=1):
        oracle.round(number, came)
    assert np.allclose(found.double().numpy(), oracle.state, rtol=0, atol=2e-5)
    idle = [site for site in sites if site.sent[-1][0] == 5 and len(ORDER) in site.sent[-1][1]]
    assert len(idle) == 2
    for site in idle:
        assert torch.equal(site.weights.tensors[NAME], found)
    down = {r["round"]: r["bytes"]["down"] for r in trainings(tmp_path) if r["client"] == "site-1"}
    one, both = 4 * 60 * 2, 4 * (60 + 40) * 4  # updates of one round: 60 x 2 numbers; of two rounds: with their bases
    assert one < down[2] < one + 300 < both < down[4] < both + 300


def test_a_site_that_was_slow_is_sent_the_steps_that_it_lacks(tmp_path: Path) -> None:
    sites = [Site(1), Site(2), Site(3)]
    buffered(tmp_path, sites, [1, 2, 1, 2, 3, 1, 3, 1], 4)
    assert sites[2].sent == [(1, []), (4, [1, 2, 3]), (4, [4])]
    assert sites[0].sent == [(1, []), (2, [1]), (3, [2]), (4, [3]), (4, [4])]
    assert sites[1].sent == [(1, []), (2, [1])]  # round 3's work is open at the end, so it is not asked for its scores
    down = {(r["round"], r["client"]): r["bytes"]["down"] for r in trainings(tmp_path)}
    assert down[3, "site-3"] == 0  # as it was sent in round 1
    assert down[4, "site-3"] > down[4, "site-1"] > 0


def trainings(tmp_path: Path) -> list[dict[str, Any]]:
    return [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"]


@pytest.mark.parametrize("strategy", [{"name": "fedftg", "rank": 2}, SECTION])
@pytest.mark.parametrize("optimizer", [None, "fedavgm"])
def test_with_all_sites_in_each_round_it_is_the_same_to_the_last_bit(
    tmp_path: Path, strategy: dict[str, Any], optimizer: str | None
) -> None:
    more = {"strategy": strategy, "server_optimizer": optimizer}
    site = SharedSite if "subspace" in strategy else Site
    waiting = run(tmp_path / "rounds", [site(1), site(2), site(3)], 3, **more)[NAME]
    cohort = ALL | {"size": 3, "max_age": 0}
    order = [3, 1, 2, 2, 3, 1, 1, 2, 3]
    assert torch.equal(buffered(tmp_path, [site(1), site(2), site(3)], order, 3, cohort, **more), waiting)


def test_the_same_order_of_arrival_gives_the_same_bits_and_another_one_others(tmp_path: Path) -> None:
    orders = {"a": [1, 2, 1, 3, 2, 3], "b": [1, 2, 1, 3, 2, 3], "c": [1, 2, 1, 2, 2, 3]}
    found = {name: buffered(tmp_path / name, [Site(1), Site(2), Site(3)], o, 3) for name, o in orders.items()}
    assert torch.equal(found["a"], found["b"])
    assert not torch.allclose(found["a"], found["c"])


@pytest.mark.parametrize("stopped_in", [1, 3])
def test_resumed_run_gives_all_sites_new_work_and_goes_on_as_fedbuff_does(tmp_path: Path, stopped_in: int) -> None:
    """The server dies when one update of a round has come; neither that one nor what the slow site does counts."""
    before, rest = [(1, 2)] * (stopped_in - 1), [(3, 1), *[(2, 1)] * (4 - stopped_in)]

    def fail(message: Message) -> Message | None:
        trains = message.metadata.message_type == MessageType.TRAIN
        stops = trains and (message.metadata.dst_node_id == 3 or message.metadata.group_id == str(stopped_in))
        return Message(Error(2, "power cut"), reply_to=message) if stops else None

    sites = [Site(1), Site(2), Site(3)]
    for site in sites[1:]:
        site.before_reply = fail
    with pytest.raises(FederationError, match=f"round {stopped_in}: 1 valid updates, 2 needed"):
        buffered(tmp_path, sites, [*flat(before), 1, 2, 3], 4, admission={"rows_ratio": None})
    assert not (tmp_path / "run" / "earlier").exists()
    found, again = [], [Site(1), Site(2), Site(3)]
    for name in ("run", "copy"):
        if name == "run":
            shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
        folder = tmp_path if name == "run" else tmp_path / "copy"
        again = [Site(1), Site(2), Site(3)]
        found.append(buffered(folder, again, flat(rest), 4, resume=True, admission={"rows_ratio": None}))
    oracle = FedBuff()
    for number, came in enumerate(before, start=1):
        oracle.round(number, came)
    oracle.since = dict.fromkeys(oracle.since, stopped_in)
    for number, came in enumerate(rest, start=stopped_in):
        oracle.round(number, came)
    assert torch.equal(*found)
    assert np.allclose(found[0].double().numpy(), oracle.state, rtol=0, atol=2e-5)
    assert {site.sent[0][0] for site in again} == {stopped_in}
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["round"] for r in records if r["phase"] == "aggregate"] == [1, 2, 3, 4]
    assert len(trainings(tmp_path)) == 8


def flat(came: Sequence[tuple[int, ...]]) -> list[int]:
    return [site for sites in came for site in sites]


def test_an_update_that_is_too_old_is_dropped_and_its_site_begins_anew(tmp_path: Path) -> None:
    sites = [Site(1), Site(2), Site(3)]
    found = buffered(tmp_path, sites, [1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 1], 5, ALL | {"max_age": 2})
    (dropped,) = events(tmp_path, "update_dropped")
    assert dropped["reason"] == "site-3: 3 rounds were finished since it started; allowed by `cohort.max_age`: 2"
    assert (dropped["round"], dropped["age"]) == (4, 3)
    assert ("site-3", 4) in [(e["client"], e["round"]) for e in events(tmp_path, "work_given")]
    assert counted(tmp_path)[-2:] == [(5, "site-3", 1), (5, "site-1", 0)]
    assert not events(tmp_path, "client_failed") + events(tmp_path, "update_refused")
    assert sites[2].sent[:2] == [(1, []), (4, [1, 2, 3])]
    without = buffered(tmp_path / "x", [Site(1), Site(2), Site(3)], [1, 2] * 4, 4, ALL | {"max_age": 2})
    assert not torch.equal(found, without)


def test_age_is_what_the_server_has_noted_and_nothing_that_a_site_says(tmp_path: Path) -> None:
    class Liar(Site):
        def _train(self, server_round: int) -> Any:
            told = super()._train(server_round)
            return type(told)(**{**vars(told), "server_round": server_round + 2})

    buffered(tmp_path, [Site(1), Site(2), Liar(3)], [1, 2, 1, 2, 3, 1, 2], 3)
    (refused,) = events(tmp_path, "update_refused")
    assert refused["reason"] == "site-3: the update is of round 3, this is round 1"
    assert refused["round"] == 3


def test_first_updates_count_and_a_reply_beyond_them_counts_for_the_next_round(tmp_path: Path) -> None:
    sites = [Site(1), Site(2), Site(3)]
    run(tmp_path, sites, 2, cohort=ALL)  # all are there at once
    assert counted(tmp_path) == [(1, "site-1", 0), (1, "site-2", 0), (2, "site-3", 1), (2, "site-1", 0)]


def test_site_that_is_silent_is_given_work_again_after_the_deadline_and_never_waited_for(
    tmp_path: Path, clock: Clock
) -> None:
    asked: list[int] = []

    def silent(number: int, message: Message) -> int:
        if number == 3 and message.metadata.message_type == MessageType.TRAIN:
            asked.append(int(message.metadata.group_id))
            return 10**9
        if message.metadata.message_type == MessageType.TRAIN:
            return 3  # polls
        return 0

    began = clock.now
    cohort = ALL | {"round_deadline": 2.0}
    run(tmp_path, [Site(1), Site(2), Site(3)], 8, late=silent, cohort=cohort)
    assert clock.now - began < 8 * 2.0
    failed = events(tmp_path, "client_failed")
    assert {e["reason"] for e in failed} == {"site-3: no answer within 2 seconds"}
    assert not any(e["counted"] for e in failed)
    assert len(set(asked)) > 1
    assert {e["client"] for e in events(tmp_path, "reply")} == {"site-1", "site-2"}


def test_too_few_updates_end_the_run_with_the_reasons(tmp_path: Path) -> None:
    sites = [Site(1), Site(2), Site(3)]
    for site in sites[1:]:
        site.before_reply = lambda message: Message(Error(2, "out of memory"), reply_to=message)
    text = "round 1: 1 valid updates, 2 needed; site-2: out of memory; site-3: out of memory"
    with pytest.raises(FederationError, match=re.escape(text)):
        buffered(tmp_path, sites, [1, 2, 3], 1)


def test_fewer_than_size_are_enough_when_nobody_else_is_there(tmp_path: Path) -> None:
    buffered(tmp_path, [Site(1), Site(2)], [1, 2, 2, 1], 2, ALL | {"size": 3})
    assert counted(tmp_path) == [(1, "site-1", 0), (1, "site-2", 0), (2, "site-2", 0), (2, "site-1", 0)]


def test_site_whose_worker_died_gets_the_work_of_the_round_that_is_open_then(tmp_path: Path) -> None:
    sites = [Site(1), Site(2), Site(3)]

    def die_once(message: Message) -> Message | None:
        if len(sites[2].sent) == 1 and message.metadata.message_type == MessageType.TRAIN:
            sites[2].forget()
            return Message(Error(WorkerDied.code, "the worker's process ended"), reply_to=message)
        return None

    sites[2].before_reply = die_once
    buffered(tmp_path, sites, [1, 2, 3, 1, 3, 1, 2], 3)
    assert [sent[0] for sent in sites[2].sent][:2] == [1, 2]
    assert (2, "site-3", 0) in counted(tmp_path)


def test_site_that_joins_in_a_round_is_given_work_at_once(tmp_path: Path) -> None:
    """Else the round would wait for the slow one."""
    one, two, three = Site(1), Site(2), Site(3)
    grid = Ordered({1: one, 2: two}, [1, 3, 1, 3])

    def join(message: Message) -> None:
        grid.sites[3] = three

    one.before_reply = join  # type: ignore[assignment]
    run(tmp_path, [one, two], 2, grid=grid, cohort=ALL)
    assert counted(tmp_path) == [(1, "site-1", 0), (1, "site-3", 0), (2, "site-1", 0), (2, "site-3", 0)]
    assert [(e["round"], e["client"]) for e in events(tmp_path, "work_given")] == [(1, "site-3")]


def test_scores_that_come_late_are_noted_and_decide_nothing(tmp_path: Path) -> None:
    class Scored(Site):
        def _train(self, server_round: int) -> Any:
            told = super()._train(server_round)
            return type(told)(**{**vars(told), "scores": {"loss": float(server_round), "examples": 1.0}})

    sites = [Scored(1), Scored(2), Scored(3)]
    buffered(tmp_path, sites, [1, 2, 1, 2, 1, 2, 1, 3], 4)
    told = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "evaluate"]
    late = [(r["round"], r["client"], r["age"]) for r in told if "age" in r]
    assert late == [(0, "site-3", 3)]
    assert [e["round"] for e in events(tmp_path, "best_round")] == [1]
