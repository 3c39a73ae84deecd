"""A run that was killed goes on after the newest checkpoint that is whole."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import expected, in_one_process
from tests.harness.results import events, same_bits, trainings

SIZES = {"site-a": 9, "site-b": 17}


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["state.safetensors", "steps.safetensors", "checkpoint.json"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    file = make_federation(tmp_path, SIZES, rounds=4)
    run = in_one_process(file, killed_in=4)
    newest = max((run / "checkpoints").iterdir())
    assert newest.name == "round-000003"
    damage(newest / name)
    in_one_process(file, resume=True)
    (damaged,) = events(run, "checkpoint_damaged")
    assert f"checkpoint {newest} is damaged" in damaged["reason"]
    assert [event["round"] for event in events(run, "resumed")] == [2]
    assert trainings(run) == [(n, site) for n in range(1, 5) for site in SIZES]
    same_bits(run, expected(tmp_path / "straight", SIZES, rounds=4))
