"""The toy of RoLoRA's section 4.2 (arXiv 2502.01755) at 3 and at 50 sites, until it learns no more: who is robust?

Model and training are those of ``benchmarks.toy``, with 20 local steps a round as in the paper's runs on GLUE. The same
number of images is split over the sites, each with its own shares of the digits (Dirichlet). Every method is judged on
test images at the rate, and after the round, that were best on validation images.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import chain, islice, repeat
from multiprocessing import get_context
from statistics import mean, median, stdev

import numpy as np
import torch
from torch import Tensor

from benchmarks.table import Cell, Table
from benchmarks.toy import BATCH, Images, accuracy, federate, start
from common.errors import AggregationError
from deploy.data.recipes.mnist import digits
from deploy.experiment.compare_claims import Paired
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.rolora import RoLoRARule

SITES, ALPHA, SEEDS = (3, 50), 0.3, 5
IMAGES, EVALUATED = 3200, 2000  # all sites together; for the choice of rate and round, and as many for the test
STEPS, ROUNDS, EVERY = 20, 300, 10  # local steps a round; rounds; rounds between two looks at the validation images
#: Rule, and the learning rates that are tried first.
METHODS = {
    "LoRA (FedIT)": (FedITRule, (0.2, 0.4, 0.8)),
    "FlexLoRA": (FlexLoRARule, (0.0125, 0.025, 0.05)),
    "FFA-LoRA": (FFALoRARule, (6.4, 12.8, 25.6)),
    "RoLoRA": (RoLoRARule, (0.2, 0.4, 0.8)),
}
FURTHER = 8  # more rates that a method may try, in steps of 2, while the best one is the first or the last


def split(images: list[Tensor], sites: int, alpha: float) -> tuple[Images, Images, Images]:
    """Images to train on, (sites, equally many, 784), to choose by, and to test on, (1, EVALUATED, 784).

    All sites have equally many: they are trained side by side, in one tensor.
    """
    random = np.random.default_rng(0)
    pools = [list(random.permutation(len(of))) for of in images]

    def drawn(count: int, shares: np.ndarray) -> tuple[Tensor, Tensor]:
        found = []
        for _ in range(count):
            left = shares * [len(pool) > 0 for pool in pools] + 1e-12 * np.array([len(pool) for pool in pools])
            digit = random.choice(len(pools), p=left / left.sum())
            found.append((images[digit][pools[digit].pop()], digit))
        return torch.stack([image for image, _ in found]), torch.tensor([digit for _, digit in found])

    even = np.full(len(images), 1 / len(images))
    validation, test = (
        Images(pixels[None], told[None]) for pixels, told in (drawn(EVALUATED, even), drawn(EVALUATED, even))
    )
    own = [drawn(IMAGES // sites, random.dirichlet(alpha * len(images) * even)) for _ in range(sites)]
    pixels, labels = (torch.stack(part) for part in zip(*own, strict=True))
    return Images(pixels, labels), validation, test


def batches(size: int, order: torch.Generator) -> Iterator[Tensor]:
    """A round's batches, all of one size: ``STEPS``."""
    epochs = (torch.randperm(size, generator=order)[: size // BATCH * BATCH].split(BATCH) for _ in repeat(None))
    return islice(chain.from_iterable(epochs), STEPS)


def curve(
    method: str, rate: float, seed: int, rounds: int, parts: tuple[Images, Images, Images]
) -> list[tuple[float, float]]:
    """Accuracy on the validation and on the test images after every ``EVERY`` rounds; 0 or nothing once it diverged."""
    torch.set_num_threads(1)
    state, out = start(seed)
    reached = []
    run = federate(METHODS[method][0](), rate, parts[0], state, out, rounds, seed, batches)
    with contextlib.suppress(AggregationError):  # a factor is not finite: it diverged
        for state in islice(run, EVERY - 1, None, EVERY):
            reached.append((accuracy(state, out, parts[1]), accuracy(state, out, parts[2])))
    return reached


def best(reached: list[tuple[float, float]]) -> tuple[float, float, int]:
    """Accuracy on the validation images where it is best, on the test images there, and that round; 0 if none."""
    return max(((chosen, told, EVERY * n) for n, (chosen, told) in enumerate(reached, 1)), default=(0.0, 0.0, 0))


def own_rate(method: str, parts: tuple[Images, Images, Images], pool: Executor) -> float:
    """The rate with the best accuracy on the validation images, with a seed of its own."""
    tried: dict[float, float] = {}
    rates: tuple[float, ...] = METHODS[method][1]
    for _ in range(1 + FURTHER):
        found = pool.map(curve, repeat(method), rates, repeat(SEEDS), repeat(ROUNDS), repeat(parts))
        tried |= {rate: best(reached)[0] for rate, reached in zip(rates, found, strict=False)}
        chosen = max(tried, key=lambda rate: tried[rate])
        rates = tuple(chosen * step for step in (0.5, 2) if chosen * step not in tried)
        if not rates:
            break
    print(method, tried, flush=True)
    return chosen


def setting(sites: int, images: list[Tensor], pool: Executor) -> list[dict[str, Cell]]:
    """Every method with so many sites."""
    parts = split(images, sites, ALPHA)
    found: dict[str, tuple[float, list[tuple[float, float, int]]]] = {}
    for method in METHODS:
        rate = own_rate(method, parts, pool)
        seeds = pool.map(curve, *map(repeat, (method, rate)), range(SEEDS), repeat(ROUNDS), repeat(parts))
        found[method] = rate, [best(reached) for reached in seeds]
        print(sites, method, found[method], flush=True)
    rows: list[dict[str, Cell]] = []
    rolora = {seed: told for seed, (_, told, _) in enumerate(found["RoLoRA"][1])}
    for method, (rate, reached) in found.items():
        told = {seed: accuracy for seed, (_, accuracy, _) in enumerate(reached)}
        paired = None if method == "RoLoRA" else Paired.of(rolora, told, lower_is_better=False)
        rows.append(
            {
                "sites": sites,
                "method": method,
                "learning rate": rate,
                "best round": median(number for _, _, number in reached),
                "accuracy %": mean(told.values()),
                "deviation": stdev(told.values()),
                "RoLoRA ahead": None if paired is None else paired.difference,
                "p": None if paired is None else paired.p,
            }
        )
    return rows


def run() -> Table:
    """Every setting."""
    images = digits()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = [row for sites in SITES for row in setting(sites, images, pool)]
    notes = [
        f"{IMAGES} training images in all, {STEPS} local steps of SGD a round, batch {BATCH}, {ROUNDS} rounds; shares",
        f"of the digits at each site from Dirichlet {ALPHA:g}. Rate and round are those with the best accuracy on",
        f"{EVALUATED} validation images, the rate by another seed; accuracy is that on {EVALUATED} others.",
        "p: two-sided, of the paired t-test over the seeds.",
    ]
    return Table(f"RoLoRA's toy at {SITES[0]} and {SITES[1]} sites, {SEEDS} seeds", rows, notes)
