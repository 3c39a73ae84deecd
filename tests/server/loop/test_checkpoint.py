"""Checkpoints are whole or not there, and what is damaged is noticed."""

import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from common.errors import FederationError
from common.protocol.factors import Factors, pack
from server.loop.checkpoint import Checkpoint, newest, save
from server.run.folder import CHECKPOINTS
from strategies.fedftg import FedFTGRule
from strategies.flower.versions import Versions
from strategies.rule import Update
from tests.harness.full_disk import no_space

NAME = "model.layers.0.up.weight"


def make(rounds: int) -> Checkpoint:
    """A checkpoint after some rounds of one client's changes."""
    g, rule = torch.Generator().manual_seed(0), FedFTGRule()
    versions = Versions({NAME: torch.randn(60, 40, generator=g)})
    for number in range(1, rounds + 1):
        change = Factors(0.99, [(torch.randn(60, 2, generator=g), torch.randn(2, 40, generator=g))])
        assert NAME not in pack(NAME, change, versions.state[NAME], rule.exchange(number))
        versions.advance(rule.aggregate(number, versions.state, iter([Update("a", 3, {}, None, {NAME: change})])))
    return Checkpoint(rounds, versions.state, versions, 100 * rounds)


def silent(reason: str) -> NoReturn:
    raise AssertionError(reason)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = make(3)
    save(tmp_path, written, 2)
    read = newest(tmp_path, silent)
    assert read is not None
    assert (read.round, read.metrics_bytes) == (3, 300)
    assert torch.equal(read.state[NAME], written.state[NAME])
    before, after = written.versions, read.versions
    assert before is not None
    assert after is not None
    assert (after.first, after.latest) == (before.first, before.latest)
    assert after.state is read.state
    steps, again = before.since(before.first), after.since(after.first)
    assert steps is not None
    assert again is not None
    assert [s.server_round for s in again] == [1, 2, 3]
    assert [a.next("x") for a in again] == [s.next("x") for s in steps]


def test_strategy_without_steps_and_any_dtype(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(2, 0), "c": torch.arange(4).reshape(2, 2).T}
    save(tmp_path, Checkpoint(1, state, None, 0), 1)
    read = newest(tmp_path, silent)
    assert read is not None
    assert read.versions is None
    assert all(
        torch.equal(tensor, read.state[name]) and tensor.dtype == read.state[name].dtype
        for name, tensor in state.items()
    )


def test_moments_of_a_server_optimizer_are_kept_and_guarded(tmp_path: Path) -> None:
    moments = {"first": {"a": torch.randn(3)}, "second": {"a": torch.rand(3)}}
    save(tmp_path, Checkpoint(1, {"a": torch.ones(3)}, None, 0, {}, moments), 1)
    read = newest(tmp_path, silent)
    assert read is not None
    assert read.moments.keys() == moments.keys()
    assert all(torch.equal(named["a"], read.moments[kind]["a"]) for kind, named in moments.items())
    (tmp_path / CHECKPOINTS / "round-000001" / "moments.safetensors").unlink()
    with pytest.raises(FederationError, match=r"all 1 checkpoints in .* are damaged"):
        newest(tmp_path, lambda reason: None)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path, silent) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for rounds in (1, 2, 3, 4):
        save(tmp_path, make(rounds), 2)
    assert sorted(f.name for f in (tmp_path / CHECKPOINTS).iterdir()) == ["round-000003", "round-000004"]


@pytest.mark.parametrize("file", ["checkpoint.json", "state.safetensors", "steps.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "gone"])
def test_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, make(1), 2)
    save(tmp_path, make(2), 2)
    path = tmp_path / CHECKPOINTS / "round-000002" / file
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    told: list[str] = []
    read = newest(tmp_path, told.append)
    assert read is not None
    assert read.round == 1
    assert torch.equal(read.state[NAME], make(1).state[NAME])
    (reason,) = told
    assert "round-000002 is damaged" in reason
    (tmp_path / CHECKPOINTS / "round-000001" / "state.safetensors").write_bytes(b"")
    with pytest.raises(FederationError, match=r"all 2 checkpoints in .* are damaged"):
        newest(tmp_path, told.append)


def test_number_that_was_edited_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, make(1), 2)
    file = tmp_path / CHECKPOINTS / "round-000001" / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "round": 7}))
    with pytest.raises(FederationError):
        newest(tmp_path, lambda reason: None)


def test_full_disk_is_an_error_that_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, make(1), 2)
    with (
        no_space(),
        pytest.raises(FederationError, match=r"round 2: checkpoint .*round-000002 cannot be written: .*too large"),
    ):
        save(tmp_path, make(2), 2)
    assert [f.name for f in (tmp_path / CHECKPOINTS).iterdir()] == ["round-000001"]
    read = newest(tmp_path, silent)
    assert read is not None
    assert read.round == 1


def test_what_a_killed_server_left_unfinished_is_removed(tmp_path: Path) -> None:
    left = tmp_path / CHECKPOINTS / ".round-000002-abc" / "new"
    left.mkdir(parents=True)
    (left / "state.safetensors").write_text("half of")
    save(tmp_path, make(1), 2)
    assert [f.name for f in (tmp_path / CHECKPOINTS).iterdir()] == ["round-000001"]
