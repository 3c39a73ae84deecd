"""Rounds that wait for no slow site, together with the other options of a federation file."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MessageType

from common.errors import FederationError
from common.protocol.factors import num_bytes
from server.loop import delivery
from server.loop.checkpoint import newest
from tests.harness.fake_sites import NAME, Clock, Ordered, Site, base
from tests.harness.results import records
from tests.server.buffered.test_rounds import ALL, ORDER, FedBuff, buffered, counted, events, flat
from tests.server.loop.test_admission import DECLARED, Faulty, scaled
from tests.server.loop.test_best import SET, losses
from tests.server.loop.test_delivery import Keeper, deliver, told
from tests.server.loop.test_who_joins import Noisy, unevaluated

PUBLISHED = {"name": "fedftg", "rank": 2, "downlink_rank": 1}
ANY_ROWS: dict[str, Any] = {"admission": {"rows_ratio": None}}
Array = np.ndarray


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def three() -> list[Site]:
    return [Site(1), Site(2), Site(3)]


def fedbuff(order: Sequence[Sequence[int]] = ORDER) -> Array:
    oracle = FedBuff()
    for number, came in enumerate(order, start=1):
        oracle.round(number, came)
    return oracle.state


def near(found: torch.Tensor, exact: Array, tolerance: float = 2e-5) -> bool:
    return np.allclose(found.double().numpy(), exact, rtol=0, atol=tolerance)


class TestWayDown:
    """With ``downlink_rank`` sites train from what was published; the server's sum is that of FedBuff all the same."""

    @pytest.mark.parametrize("rank", [1, 3, "auto"])
    def test_nothing_is_lost_and_every_site_can_follow(self, tmp_path: Path, rank: int | str) -> None:
        sites, strategy = three(), PUBLISHED | {"downlink_rank": rank}
        kept = {"every": 1, "keep": 9}
        found = buffered(tmp_path, sites, flat(ORDER), len(ORDER), strategy=strategy, checkpoint=kept, **ANY_ROWS)
        assert near(found, fedbuff(), 5e-5)
        idle = [site for site in sites if site.sent[-1][0] == len(ORDER)]
        assert len(idle) == 2
        assert all(torch.equal(site.weights.tensors[NAME], found) for site in idle)
        for number in range(1, len(ORDER)):
            assert near(published(tmp_path, number) + waiting(tmp_path, number), fedbuff(ORDER[:number]), 5e-5)
            assert np.linalg.norm(waiting(tmp_path, number)) > 1
        assert not (tmp_path / "run" / "checkpoints" / f"round-{len(ORDER):06}" / "waiting.safetensors").exists()

    def test_what_goes_down_is_bounded(self, tmp_path: Path) -> None:
        buffered(tmp_path, three(), flat(ORDER), len(ORDER), strategy=PUBLISHED, **ANY_ROWS)
        down = [r["bytes"]["down"] for r in records(tmp_path / "run", "train") if r["client"] == "site-1"]
        direction = 4 * (60 + 40)
        assert all(
            direction < sent < 1.8 * direction for sent in down[1:]
        )  # site-1 takes part in each round but the last

    @pytest.mark.parametrize("optimizer", [None, {"method": "fedavgm", "momentum": 0.5}])
    @pytest.mark.parametrize("stopped_in", [1, 3])
    def test_resumed_run_loses_nothing_that_waited(
        self, tmp_path: Path, stopped_in: int, optimizer: dict[str, Any] | None
    ) -> None:
        more = {"strategy": PUBLISHED, "server_optimizer": optimizer, **ANY_ROWS}
        before, rest = [(1, 2)] * (stopped_in - 1), [(3, 1), *[(2, 1)] * (4 - stopped_in)]
        interrupted(tmp_path, before, stopped_in, **more)
        kept = newest(tmp_path / "run", pytest.fail)
        assert (kept is None) == (stopped_in == 1)
        assert kept is None or num_bytes(kept.waiting.values()) > 0
        shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
        found = [buffered(at, three(), flat(rest), 4, resume=True, **more) for at in (tmp_path, tmp_path / "copy")]
        assert torch.equal(*found)
        oracle = Momentum(0.0 if optimizer is None else 0.5)
        oracle.rounds(before, 1)
        oracle.since = dict.fromkeys(oracle.since, stopped_in)
        oracle.rounds(rest, stopped_in)
        assert near(found[0], oracle.state, 1e-4)


class Momentum(FedBuff):
    """FedBuff with FedAvgM (arXiv 1909.06335) at the server."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum, self.moved = momentum, np.zeros_like(self.state)

    def rounds(self, order: Sequence[Sequence[int]], first: int) -> None:
        for number, came in enumerate(order, start=first):
            before = self.state
            self.round(number, came)
            self.moved = self.momentum * self.moved + self.state - before
            self.state = before + self.moved


def interrupted(tmp_path: Path, before: Sequence[Sequence[int]], stopped_in: int, **more: Any) -> None:
    """A run that ends in a round with one valid update, while site 3 has never answered."""

    def fail(message: Message) -> Message | None:
        trains = message.metadata.message_type == MessageType.TRAIN
        stops = trains and (message.metadata.dst_node_id == 3 or message.metadata.group_id == str(stopped_in))
        return Message(Error(2, "power cut"), reply_to=message) if stops else None

    sites = three()
    for site in sites[1:]:
        site.before_reply = fail
    with pytest.raises(FederationError, match=f"round {stopped_in}: 1 valid updates, 2 needed"):
        buffered(tmp_path, sites, [*flat([tuple(came) for came in before]), 1, 2, 3], 4, **more)


def checkpoint_of(tmp_path: Path, number: int, file: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(tmp_path / "run" / "checkpoints" / f"round-{number:06}" / f"{file}.safetensors")


def published(tmp_path: Path, number: int) -> torch.Tensor:
    return checkpoint_of(tmp_path, number, "state")[NAME].double()


def waiting(tmp_path: Path, number: int) -> torch.Tensor:
    kept = checkpoint_of(tmp_path, number, "waiting")
    return kept[NAME].double() if NAME in kept else kept[f"{NAME}/left"].double() @ kept[f"{NAME}/right"].double()


SIX = [1, 2, 3, 4, 5, 6]
#: Of six sites the first five of each round; the change of the sixth is two rounds old when it counts.
OF_SIX = [(1, 2, 3, 4, 5), (5, 4, 3, 2, 1), (6, 1, 2, 3, 4), (1, 2, 3, 5, 4)]
ROBUST: dict[str, tuple[dict[str, Any], Callable[[Array, Array], Array]]] = {
    "uniform": ({"method": "mean", "weights": "uniform"}, lambda moved, rows: moved.mean(0)),
    "clipped": ({"method": "mean", "clip_norm": 0.9}, lambda moved, rows: weighted(clipped(moved, 0.9), rows)),
    "median": ({"method": "median"}, lambda moved, rows: np.median(moved, axis=0)),
    "trimmed": ({"method": "trimmed-mean", "trim": 0.2}, lambda moved, rows: np.sort(moved, axis=0)[1:-1].mean(0)),
    "krum": ({"method": "krum", "byzantine": 1}, lambda moved, rows: moved[krum(moved)[0]]),
    "multi-krum": (
        {"method": "multi-krum", "byzantine": 1},
        lambda moved, rows: weighted(moved[krum(moved)[:-1]], rows[krum(moved)[:-1]]),
    ),
}


def weighted(moved: Array, rows: Array) -> Array:
    return np.asarray(np.tensordot(rows / rows.sum(), moved, axes=1))


def clipped(moved: Array, ratio: float) -> Array:
    norms = np.linalg.norm(moved.reshape(len(moved), -1), axis=1)
    return np.asarray(moved * np.minimum(1, ratio * np.median(norms) / norms)[:, None, None])


def krum(moved: Array) -> list[int]:
    """The updates by the sum of their two smallest squared distances (f = 1 of 5), the smallest first."""
    flat_ = moved.reshape(len(moved), -1)
    square = ((flat_[:, None] - flat_[None]) ** 2).sum(-1)
    return list(np.argsort([sum(sorted(row)[1:3]) for row in square], kind="stable"))


@pytest.mark.parametrize("method", ROBUST)
def test_robust_rules_see_changes_as_they_count(tmp_path: Path, method: str) -> None:
    section, robust = ROBUST[method]
    cohort = ALL | {"min_clients": 5, "size": 5}
    sites = [Site(number) for number in SIX]
    found = buffered(tmp_path, sites, flat(OF_SIX), len(OF_SIX), cohort, aggregation=section, **ANY_ROWS)
    state, since, oracle = base()[NAME].double().numpy(), dict.fromkeys(SIX, 1), FedBuff()
    for number, came in enumerate(OF_SIX, start=1):
        by_name = sorted(came)
        ages = {site: number - since[site] for site in by_name}
        moved = np.stack([(1 + ages[site]) ** -0.5 * oracle.change(site, since[site]) for site in by_name])
        state = state + robust(moved, np.array(by_name, dtype=float))
        since |= dict.fromkeys(came, number + 1)
    assert [age for *_, age in counted(tmp_path) if age] == [2, 1]
    assert near(found, state, 5e-5)


def test_no_site_weighs_more_than_the_median_of_all_allows(tmp_path: Path) -> None:
    found = buffered(tmp_path, three(), flat(ORDER), len(ORDER), admission={"rows_ratio": 1.0})
    oracle, limit = FedBuff(), 2  # rows are 1, 2 and 3
    for number, came in enumerate(ORDER, start=1):
        rows = {site: min(site, limit) for site in came}
        state = oracle.state
        for site in came:
            age = number - oracle.since[site]
            state = state + rows[site] / sum(rows.values()) * (1 + age) ** -0.5 * oracle.change(
                site, oracle.since[site]
            )
        oracle.state = state
        oracle.since |= dict.fromkeys(came, number + 1)
    assert near(found, oracle.state)
    assert [e["client"] for e in events(tmp_path, "weight_capped")] == ["site-3"]


def test_drift_is_that_of_changes_as_they_count(tmp_path: Path) -> None:
    """Not of the norms that admission saw."""
    buffered(tmp_path, three(), flat(ORDER), len(ORDER), **ANY_ROWS)
    told = [r["diagnostics"]["client-norm/model.layers.0"] for r in records(tmp_path / "run", "aggregate")]
    oracle, since = FedBuff(), {1: 1, 2: 1, 3: 1}
    for number, came in enumerate(ORDER, start=1):
        norms = [np.linalg.norm(oracle.change(s, since[s])) * (1 + number - since[s]) ** -0.5 for s in came]
        assert told[number - 1] == pytest.approx(np.mean(norms), rel=1e-5)
        since |= dict.fromkeys(came, number + 1)


@pytest.mark.parametrize(("norm_ratio", "refused"), [(8.0, True), (15.0, False)])
def test_bound_on_norms_is_that_of_changes_as_they_came(tmp_path: Path, norm_ratio: float, refused: bool) -> None:
    """Site 4's change is twelve times as long as usual, and counts half, so six times as much.

    Another site's update takes the place of the one that is refused.
    """
    sites = [Site(1), Site(2), Site(3), Faulty(4, range(1, 9), scaled(12.0))]
    cohort, training = ALL | {"min_clients": 3, "size": 3}, {"learning_rate": 700.0, "local_steps": 1}
    admission = {"norm_ratio": norm_ratio, "max_refusals": 1}
    buffered(tmp_path, sites, [*(1, 2, 3) * 3, 4, 1, 2, 3], 4, cohort, admission=admission, training=training)
    told = [e for e in events(tmp_path, "update_refused") if e["client"] == "site-4"]
    assert [e["round"] for e in told] == [4] * refused
    assert all("8 times the round's median" in e["reason"] for e in told)
    assert [e["client"] for e in events(tmp_path, "client_excluded")] == ["site-4"] * refused
    last = [r["client"] for r in records(tmp_path / "run", "train") if r["round"] == 4]
    assert sorted(last) == ["site-1", "site-2", "site-3" if refused else "site-4"]


@pytest.mark.parametrize(("declared", "refused"), [(100.0, False), (10.0, True)])
def test_noise_in_an_old_update_is_bounded_by_what_its_site_declared(
    tmp_path: Path, declared: float, refused: bool
) -> None:
    sites = [Site(1), Site(2), Site(3), Noisy(4, 100.0)]
    sites[3].privacy = {**DECLARED, "noise": declared}
    for site in sites:
        site.before_reply = unevaluated
    cohort = ALL | {"min_clients": 3, "size": 3}
    buffered(tmp_path, sites, [*(1, 2, 3) * 2, 4, 1, 2, 3], 3, cohort, admission={"max_noise": 200.0})
    assert [e["round"] for e in events(tmp_path, "update_refused")] == [3] * refused
    assert ((3, "site-4", 2) in counted(tmp_path)) != refused


def test_run_that_stops_early_gives_up_the_work_that_is_open_and_publishes_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses(monkeypatch, 9.0, 3.0, 2.0, 2.5, 2.6, 2.7)
    order, best = [(1, 2)] * 5, {"patience": 2}  # the scores after round 4 are known in round 5
    found = buffered(tmp_path, three(), flat(order), 9, evaluation=SET, best=best, strategy=PUBLISHED, **ANY_ROWS)
    (stopped,) = events(tmp_path, "stopped_early")
    assert stopped["round"] == 5
    assert near(found, fedbuff(order), 5e-5)
    assert not newest(tmp_path / "run", pytest.fail).waiting  # type: ignore[union-attr]


@pytest.mark.parametrize("every", [2, 3])
def test_resumed_from_an_earlier_checkpoint(tmp_path: Path, every: int) -> None:
    """The rounds since then are made again, with the sites' new work."""
    more = {"checkpoint": {"every": every}, "strategy": PUBLISHED, **ANY_ROWS}
    interrupted(tmp_path, [(1, 2)] * 3, 4, **more)
    kept = newest(tmp_path / "run", pytest.fail)
    assert kept is not None
    assert kept.round == every
    rest = [(3, 1), (2, 1)][: 4 - every]
    found = buffered(tmp_path, three(), flat(rest), 4, resume=True, **more)
    oracle = FedBuff()
    for number, came in enumerate([(1, 2)] * every, start=1):
        oracle.round(number, came)
    oracle.since = dict.fromkeys(oracle.since, every + 1)
    for number, came in enumerate(rest, start=every + 1):
        oracle.round(number, came)
    assert near(found, oracle.state, 5e-5)
    assert [r["round"] for r in records(tmp_path / "run", "aggregate")] == [1, 2, 3, 4]


def test_site_that_is_at_work_when_the_rounds_end_gets_the_model_as_soon_as_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites: list[Site] = [Keeper(1), Keeper(2), Keeper(3)]
    grid = Ordered(dict(enumerate(sites, start=1)), [3, 1, 1, 2])  # site 3 works from round 2 on
    deliveries = {delivery.DELIVER: 20}  # so often its answer is not there yet

    def busy(number: int, message: Message) -> int:
        return deliveries.get(message.metadata.message_type, 0) if number == 3 else 0

    grid._late = busy
    folder = deliver(tmp_path, sites, away={}, monkeypatch=monkeypatch, grid=grid, cohort=ALL, strategy=PUBLISHED)
    assert [e["client"] for e in told(folder, "model_delivered")] == ["site-1", "site-2", "site-3"]
    assert [one.sent[-1][0] for one in sites] == [2, 2, 1]  # it was asked for no scores meanwhile
