"""The toy of RoLoRA's section 4.2 (arXiv 2502.01755) at 3 and at 50 sites, until it learns no more: who is robust?

Model and training are those of ``benchmarks.toy``, with 20 local steps a round as in the paper's runs on GLUE. The same
number of images is split over the sites, each with its own shares of the digits (Dirichlet). Every method is judged on
test images at the rate, and after the round, that were best on validation images.

In the toy nothing was learnt before. ``run_tuned`` fine-tunes: f(x) = ReLU(x (W + A B)) W_out, where W and W_out have
learnt to tell other images that lie on their side, and B is 0 at first.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from multiprocessing import get_context
from statistics import mean, median, stdev

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.table import Cell, Table
from benchmarks.toy import BATCH, PIXELS, A, B, Images, accuracy, federate, start
from common.errors import AggregationError
from deploy.data.recipes.mnist import digits
from deploy.experiment.compare_claims import Paired
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.rolora import RoLoRARule
from strategies.rule import Tensors

SITES, ALPHA, SEEDS = (3, 50), 0.3, 5
IMAGES, EVALUATED = 3200, 2000  # all sites together; for the choice of rate and round, and as many for the test
STEPS, ROUNDS, EVERY = 20, 300, 10  # local steps a round; rounds; rounds between two looks at the validation images
#: Rule, and the learning rates that are tried first: in the toy, and in fine-tuning.
METHODS = {
    "LoRA (FedIT)": (FedITRule, (0.2, 0.4, 0.8), (0.05, 0.1, 0.2)),
    "FlexLoRA": (FlexLoRARule, (0.0125, 0.025, 0.05), (0.0125, 0.025, 0.05)),
    "FFA-LoRA": (FFALoRARule, (6.4, 12.8, 25.6), (51.2, 102.4, 204.8)),
    "RoLoRA": (RoLoRARule, (0.2, 0.4, 0.8), (0.05, 0.1, 0.2)),
}
LEARNT, TUNED_RANK = 250, 4  # images of each digit that the base has seen; rank of the fine-tuning
FURTHER = 8  # more rates that a method may try, in steps of 2, while the best one is the first or the last


@dataclass(frozen=True)
class Task:
    """Images to train on, to choose by and to test on; W_out of what was learnt before, (784, 10), if anything was."""

    train: Images
    validation: Images
    test: Images
    out: Tensor | None = None

    def begin(self, seed: int) -> tuple[Tensors, Tensor]:
        """A and B as they are drawn, and W_out."""
        state, out = start(seed)
        if self.out is None:
            return state, out
        return {A: state[A][:TUNED_RANK], B: torch.zeros(PIXELS, TUNED_RANK)}, self.out


def lying(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """W (784, 784) and W_out (784, 10) of a model that tells digits, each (images, 784), turned by a quarter."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(PIXELS, PIXELS, bias=False), nn.Linear(PIXELS, 10, bias=False)
    model = nn.Sequential(inner, nn.ReLU(), outer)
    pixels = torch.cat([of.reshape(-1, 28, 28).rot90(1, (1, 2)).reshape(-1, PIXELS) for of in images])
    labels = torch.cat([torch.full((len(of),), digit) for digit, of in enumerate(images)])
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        for rows in torch.randperm(len(labels)).split(32):
            adam.zero_grad()
            nn.functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            adam.step()
    return inner.weight.detach().T, outer.weight.detach().T


def deal(images: list[Tensor], sites: int, *, tuned: bool) -> Task:
    """The images split over so many sites; with ``tuned`` the base learns from some that no site has."""
    if not tuned:
        return Task(*split(images, sites, ALPHA))
    weight, out = lying([of[:LEARNT] for of in images])
    parts = split([of[LEARNT:] for of in images], sites, ALPHA)
    train, validation, test = (replace(part, known=part.pixels @ weight) for part in parts)
    return Task(train, validation, test, out)


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


def curve(method: str, rate: float, seed: int, rounds: int, task: Task) -> list[tuple[float, float]]:
    """Accuracy on the validation and on the test images after every ``EVERY`` rounds; 0 or nothing once it diverged."""
    torch.set_num_threads(1)
    state, out = task.begin(seed)
    reached = []
    run = federate(METHODS[method][0](), rate, task.train, state, out, rounds, seed, batches)
    with contextlib.suppress(AggregationError):  # a factor is not finite: it diverged
        for state in islice(run, EVERY - 1, None, EVERY):
            reached.append((accuracy(state, out, task.validation), accuracy(state, out, task.test)))
    return reached


def best(reached: list[tuple[float, float]]) -> tuple[float, float, int]:
    """Accuracy on the validation images where it is best, on the test images there, and that round; 0 if none."""
    return max(((chosen, told, EVERY * n) for n, (chosen, told) in enumerate(reached, 1)), default=(0.0, 0.0, 0))


def own_rate(method: str, task: Task, pool: Executor) -> float:
    """The rate with the best accuracy on the validation images, with a seed of its own."""
    tried: dict[float, float] = {}
    rates: tuple[float, ...]
    _, untrained, tuned = METHODS[method]
    rates = untrained if task.out is None else tuned
    for _ in range(1 + FURTHER):
        found = pool.map(curve, repeat(method), rates, repeat(SEEDS), repeat(ROUNDS), repeat(task))
        tried |= {rate: best(reached)[0] for rate, reached in zip(rates, found, strict=False)}
        chosen = max(tried, key=lambda rate: tried[rate])
        rates = tuple(chosen * step for step in (0.5, 2) if chosen * step not in tried)
        if not rates:
            break
    print(method, tried, flush=True)
    return chosen


def setting(sites: int, task: Task, pool: Executor) -> list[dict[str, Cell]]:
    """Every method with so many sites."""
    found: dict[str, tuple[float, list[tuple[float, float, int]]]] = {}
    for method in METHODS:
        rate = own_rate(method, task, pool)
        seeds = pool.map(curve, *map(repeat, (method, rate)), range(SEEDS), repeat(ROUNDS), repeat(task))
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
    """The toy, which begins untrained."""
    return _table(f"RoLoRA's toy at {SITES[0]} and {SITES[1]} sites, {SEEDS} seeds", [], tuned=False)


def run_tuned() -> Table:
    """The same, fine-tuned."""
    notes = [f"Rank {TUNED_RANK}; the base has learnt from {10 * LEARNT} other images, which lay on their side."]
    return _table(f"Fine-tuning at {SITES[0]} and {SITES[1]} sites, {SEEDS} seeds", notes, tuned=True)


def _table(title: str, notes: list[str], *, tuned: bool) -> Table:
    images = digits()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = [row for sites in SITES for row in setting(sites, deal(images, sites, tuned=tuned), pool)]
    notes += [
        f"{IMAGES} training images in all, {STEPS} local steps of SGD a round, batch {BATCH}, {ROUNDS} rounds; shares",
        f"of the digits at each site from Dirichlet {ALPHA:g}. Rate and round are those with the best accuracy on",
        f"{EVALUATED} validation images, the rate by another seed; accuracy is that on {EVALUATED} others.",
        "p: two-sided, of the paired t-test over the seeds.",
    ]
    return Table(title, rows, notes)
