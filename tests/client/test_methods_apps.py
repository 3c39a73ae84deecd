"""Both Flower apps under the newer methods, on real messages in one process; a site's session is new for every message.

So all that a site holds must have come with the message, from the base model, or from what it keeps in its Flower
context, as under ``--isolation subprocess``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, Message, RecordDict

from client import app as site_app
from client.kept.own_tensors import OwnTensors
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B
from common.protocol import wire
from deploy.sandbox.tiny import make_federation
from server.loop.rounds import RoundLoop
from server.loop.server_model import ServerModel
from server.run.folder import RunFolder, read_lines
from strategies.flower.named import make_strategy
from strategies.rule import Tensors
from tests.harness.agreements import agree_all
from tests.harness.fake_sites import Grid, settings_of
from tests.harness.tiny_images import make_image_federation

LORA = {"modules": "linear", "blocks": "lower half", "rank": 4, "lora_alpha": 8.0}


class LastingSite:
    """A site in a process that goes on."""

    def __init__(self, number: int, file: Path) -> None:
        self.context = Context(1, number, {"site": str(file)}, RecordDict(), {})

    def reply(self, message: Message) -> Message:
        return site_app.app(message, self.context)


class NewSite(LastingSite):
    """A site of which only its Flower context lives on between two messages."""

    def reply(self, message: Message) -> Message:
        site_app._sessions.clear()
        return super().reply(message)


def run(
    folder: Path,
    max_rank: int | None = None,
    make: Callable[..., Path] = make_federation,
    site_kind: type[LastingSite] = NewSite,
    **changes: Any,
) -> tuple[Tensors, list[Any], dict[int, Any]]:
    """State after all rounds, the records of metrics.jsonl, and the sites."""
    file = make(folder, {"site-a": 9, "site-b": 17}, **changes)
    if max_rank is not None:
        site = yaml.safe_load((folder / "site-b.yaml").read_text())
        (folder / "site-b.yaml").write_text(yaml.safe_dump({**site, "max_rank": max_rank}))
    agree_all(file)
    config = resolved(load(file, FederationConfig), file)
    sites: dict[int, Any] = {k: site_kind(k, folder / f"site-{x}.yaml") for k, x in ((1, "a"), (2, "b"))}
    grid: Any = Grid(sites)
    record, server_model = RunFolder.create(folder / "run", config), ServerModel(config, file)
    strategy = make_strategy(
        config.strategy, seed=0, aggregation=config.aggregation, server_optimizer=config.server_optimizer
    )
    try:
        loop = RoundLoop(grid, config, settings_of(config), strategy, server_model, record)
        state = loop.run(server_model.initial_state())
    finally:
        record.close()
    events = read_lines(folder / "run" / "events.jsonl")
    assert not [e for e in events if e["event"] in ("client_failed", "update_refused", "client_refused")], events
    return state, read_lines(folder / "run" / "metrics.jsonl"), sites


def of(records: list[Any], phase: str) -> dict[tuple[str, int], Any]:
    return {(r["client"], r["round"]): r for r in records if r["phase"] == phase and r.get("client") != "server"}


@pytest.mark.parametrize(("strategy", "max_rank"), [("fedex-lora", None), ("flora", 2)])
def test_base_weights_follow_by_steps(tmp_path: Path, strategy: str, max_rank: int | None) -> None:
    state, records, _ = run(tmp_path, max_rank, strategy={"name": strategy, **LORA}, rounds=3)
    losses, bytes_ = of(records, "evaluate"), of(records, "train")
    whole = sum(4 * tensor.numel() for tensor in state.values())
    for site in ("site-a", "site-b"):
        assert losses[site, 3]["evaluate"]["loss"] < losses[site, 0]["evaluate"]["loss"]
        assert bytes_[site, 1]["bytes"]["down"] == 0
        assert 0 < bytes_[site, 2]["bytes"]["down"] < whole
        adapters = sum(4 * t.numel() for n, t in state.items() if not n.endswith(BASE_WEIGHT))
        assert bytes_[site, 1]["bytes"]["up"] < 2 * adapters
    ups = [bytes_[site, 1]["bytes"]["up"] for site in ("site-a", "site-b")]
    assert (ups[0] == ups[1]) == (max_rank is None)


def test_fedsas_b_never_travels_and_outlives_the_process(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"strategy": {"name": "fedsa-lora", **LORA}, "evaluation": {"server": None}}
    state, records, _ = run(tmp_path, rounds=3, **changes)
    assert all(name.endswith(LORA_A) for name in state)
    kept = [OwnTensors(tmp_path / f"{site}-own" / "tiny", None).after(3) for site in ("site-a", "site-b")]
    for own in kept:
        assert {name for name in own if name.endswith(LORA_B)} == {n.removesuffix(LORA_A) + LORA_B for n in state}
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    losses = of(records, "evaluate")
    for site in ("site-a", "site-b"):  # with its own B, without which the model is the base model
        assert losses[site, 3]["evaluate"]["loss"] < losses[site, 1]["evaluate"]["loss"]
        assert losses[site, 1]["evaluate"]["loss"] < losses[site, 0]["evaluate"]["loss"]


@pytest.mark.parametrize("strategy", [{"name": "rolora", **LORA}, None], ids=["rolora", "fedftg"])
def test_server_optimizer_runs_with_true_sites(tmp_path: Path, strategy: dict[str, Any] | None) -> None:
    changes: dict[str, Any] = {"server_optimizer": {"method": "fedavgm", "momentum": 0.5}, "rounds": 3}
    state, records, _ = run(tmp_path, **changes, **({"strategy": strategy} if strategy else {}))
    losses, bytes_ = of(records, "evaluate"), of(records, "train")
    for site in ("site-a", "site-b"):
        assert losses[site, 3]["evaluate"]["loss"] < losses[site, 0]["evaluate"]["loss"]
        if strategy is None:  # whole weights down, factors up
            assert bytes_[site, 3]["bytes"]["down"] >= sum(4 * tensor.numel() for tensor in state.values())
            assert bytes_[site, 3]["bytes"]["up"] < bytes_[site, 3]["bytes"]["down"]


@pytest.mark.parametrize("subspace", ["own", "shared"])
def test_fedftg_averages_a_head_whole_beside_the_factors(tmp_path: Path, subspace: str) -> None:
    """The next version goes down in steps, of which the head is a part."""
    strategy = {"name": "fedftg", "blocks": "all", "rank": 1, "scale": 1.0, "head": "train", "subspace": subspace}
    state, records, sites = run(tmp_path, make=make_image_federation, strategy=strategy, rounds=3)
    losses, bytes_ = of(records, "evaluate"), of(records, "train")
    for one in sites.values():  # what came is kept as it came: bundled
        kept = {key: record for key, record in one.context.state.items() if key.startswith("step-")}
        assert list(kept) == ["step-000001", "step-000002", "step-000003"]
        assert {array.stype for record in kept.values() for array in record.values()} == {wire.BUNDLE}
    head = sum(4 * tensor.numel() for name, tensor in state.items() if name.startswith("classifier"))
    assert head == 4 * (3 * 16 + 3)
    for site in ("site-a", "site-b"):
        assert losses[site, 3]["evaluate"]["loss"] < losses[site, 0]["evaluate"]["loss"]
        assert bytes_[site, 1]["bytes"]["down"] == 0
        assert head < bytes_[site, 2]["bytes"]["down"] < sum(4 * tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": {"method": "mean", "clip_norm": 1.0}},
        {"aggregation": {"method": "median"}},
        {"server_optimizer": {"method": "fedavgm"}},
        {"strategy": {"wire_precision": "int8"}},
        {"strategy": {"head": "local"}, "evaluation": {}},
    ],
    ids=str,
)
def test_head_beside_the_factors_goes_with_every_option(tmp_path: Path, changes: dict[str, Any]) -> None:
    strategy = {"name": "fedftg", "blocks": "all", "rank": 2, "scale": 1.0, "head": "train"}
    changes = {**changes, "strategy": {**strategy, **changes.get("strategy", {})}}
    _, records, _ = run(tmp_path, make=make_image_federation, **changes)
    losses = of(records, "evaluate")
    assert all(losses[s, 2]["evaluate"]["loss"] < losses[s, 0]["evaluate"]["loss"] for s in ("site-a", "site-b"))
