"""The toy at many sites: its images, its batches, and how rate and round are chosen."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks import many_sites
from benchmarks.many_sites import BATCH, METHODS, STEPS, Task, batches, best, curve, deal, own_rate
from benchmarks.toy import A, B, Images, accuracy, forward


def images(count: int) -> list[torch.Tensor]:
    """So many images of each digit: a pattern of its own, and noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = (torch.rand(10, 1, 784, generator=generator) > 0.8).float()
    return list(patterns * torch.rand(10, count, 784, generator=generator))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(many_sites, "IMAGES", 200)
    monkeypatch.setattr(many_sites, "EVALUATED", 50)
    monkeypatch.setattr(many_sites, "EVERY", 2)
    return deal(images(40), 5, tuned=False)


def test_no_image_is_in_two_places_and_sites_differ_in_digits_alone(small: Task) -> None:
    parts = small.train, small.validation, small.test
    assert [tuple(part.digits.shape) for part in parts] == [(5, 40), (1, 50), (1, 50)]
    rows = torch.cat([part.pixels.reshape(-1, 784) for part in parts])
    assert len(torch.unique(rows, dim=0)) == 300
    most = [int(torch.bincount(own).max()) for own in small.train.digits]
    assert max(most) > 2 * 40 / 10
    for part in parts:
        for pixels, digit in zip(part.pixels.reshape(-1, 784), part.digits.flatten().tolist(), strict=True):
            assert (images(40)[digit] == pixels).all(1).any()


@pytest.mark.parametrize("size", [40, 64, 1066])
def test_round_has_its_steps_and_sees_every_image_before_any_twice(size: int) -> None:
    found = list(batches(size, torch.Generator().manual_seed(0)))
    assert [len(rows) for rows in found] == [BATCH] * STEPS
    first = torch.cat(found[: min(STEPS, size // BATCH)])
    assert len(first.unique()) == len(first)


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn(method: str, small: Task) -> None:
    reached = curve(method, 0.1, 0, 20, small)
    assert len(reached) == 10
    assert min(reached[-1]) > 30


def test_fine_tuning_begins_with_the_model_that_has_learnt_lying_images_no_site_has(
    small: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    del small  # its sizes
    monkeypatch.setattr(many_sites, "LEARNT", 30)
    told = images(70)
    tuned = deal(told, 5, tuned=True)
    state, out = tuned.begin(0)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {A: (4, 784), B: (784, 4)}
    seen = torch.cat([of[:30] for of in told])
    lying = Images(
        seen.reshape(-1, 28, 28).rot90(1, (1, 2)).reshape(1, -1, 784), torch.arange(10).repeat_interleave(30)[None]
    )
    weight, _ = many_sites.lying([of[:30] for of in told])
    assert accuracy(state, out, replace(lying, known=lying.pixels @ weight)) > 90
    for part in (tuned.train, tuned.validation, tuned.test):
        expected = torch.relu(part.pixels @ weight) @ out
        assert torch.allclose(forward(part, state, out), expected, atol=1e-4)
        assert not (part.pixels.reshape(-1, 1, 784) == seen).all(2).any()


@pytest.mark.parametrize("method", METHODS)
def test_training_that_diverges_tells_no_digit(method: str, small: Task) -> None:
    assert best(curve(method, math.inf, 0, 10, small))[:2] == (0.0, 0.0)


def test_round_is_the_validation_images() -> None:
    assert best([(3.0, 9.0), (5.0, 1.0), (4.0, 8.0)]) == (5.0, 1.0, 2 * many_sites.EVERY)
    assert best([]) == (0.0, 0.0, 0)


def test_rates_go_on_until_the_best_one_is_between_two_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def fake(method: str, rate: float, *rest: Any) -> list[tuple[float, float]]:
        del method, rest
        tried.append(rate)
        return [(-abs(rate - 1.5), 0.0)]

    monkeypatch.setattr(many_sites, "curve", fake)
    part = Images(torch.empty(0), torch.empty(0))
    with ThreadPoolExecutor(1) as pool:
        chosen = own_rate("RoLoRA", Task(part, part, part), pool)
    assert chosen == pytest.approx(1.6)
    assert all(high == pytest.approx(2 * low) for low, high in pairwise(sorted(tried)))
    assert min(tried) < chosen < max(tried)
