"""A process's peak is its own; work that runs out of memory goes on with fewer rows at a time."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from common.system.machine import attempt, halving, resident_peak


def worker(most: int, sizes: list[int]) -> Callable[[list[int]], int]:
    def total(rows: list[int]) -> int:
        sizes.append(len(rows))
        if len(rows) > most:
            torch.empty(2**60, dtype=torch.uint8)
        return sum(rows)

    return total


def test_peak_is_that_of_the_process_and_not_of_its_parent() -> None:
    code = (
        "from common.system.machine import resident_peak as peak; a = peak(); b = b'x' * 200_000_000; print(a, peak())"
    )
    held = b"x" * 1_000_000_000
    assert resident_peak() > len(held)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < len(held)
    assert after == pytest.approx(before + 200_000_000, rel=0.05)


@pytest.mark.parametrize(
    ("most", "sizes"), [(9, [5, 5, 1]), (3, [5, 2, 2, 2, 2, 2, 1]), (1, [5, 2, *[1] * 11]), (4, [5, 2, 2, 2, 2, 2, 1])]
)
def test_every_row_counts_once_however_often_memory_runs_out(most: int, sizes: list[int]) -> None:
    seen: list[int] = []
    assert sum(halving(list(range(11)), 5, worker(most, seen))) == sum(range(11))
    assert seen == sizes


def test_row_that_does_not_fit_raises_what_pytorch_raised() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        list(halving([1, 2, 3], 2, worker(0, [])))


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        attempt(lambda: torch.ones(2) + torch.ones(3))
