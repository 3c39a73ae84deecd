"""The toy of RoLoRA's section 4.2 (arXiv 2502.01755): ten clients of one digit each, and four ways to train together.

f(x) = ReLU(x A B) W_out on MNIST digits, A (784, 16) and B (16, 784) trained, W_out (784, 10) random and fixed. The
rules in ``strategies`` choose the trained tensors and aggregate them. Tensors have PEFT's names, so lora_A is A
transposed, (16, 784), and lora_B is B transposed, (784, 16).

Two comparisons: at the paper's rate of 0.02, the same for all, and each method at the rate that suits it best. The
paper has 6,000 images at each client, batches of 64 and 5 local epochs, which are 470 steps. Here it is 320 images,
batches of 8 and 12 epochs: 480 steps.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.table import Cell, Table
from common.errors import AggregationError
from deploy.data.recipes.mnist import digits
from strategies.fedit import FedITRule
from strategies.ffa_lora import FFALoRARule
from strategies.rolora import RoLoRARule
from strategies.rule import Averaging, Rule, Tensors, Update

A, B = "toy.lora_A.weight", "toy.lora_B.weight"
RANK, PIXELS = 16, 784
EPOCHS, BATCH, ROUNDS, SEEDS = 12, 8, 100, 5
SELECTION_ROUNDS = 40
COMMON_RATE = 0.02
TRAIN, EVALUATED = 320, 200  # images of each digit: for training; for the choice of the rate, and for the test
#: Rule, and the learning rates that it may choose from. FFA-LoRA wants larger ones than LoRA.
METHODS: dict[str, tuple[type[Averaging], tuple[float, ...]]] = {
    "LoRA (FedIT)": (FedITRule, (0.02, 0.05, 0.1)),
    "FFA-LoRA": (FFALoRARule, (0.1, 0.2, 0.5)),
    "RoLoRA": (RoLoRARule, (0.02, 0.05, 0.1)),
    "centralised": (FedITRule, (0.02, 0.05, 0.1)),
}
PUBLISHED = {"LoRA (FedIT)": 62.0, "FFA-LoRA": 62.5, "RoLoRA": 84.0, "centralised": 97.5}


@dataclass(frozen=True)
class Images:
    """Images by client, (clients, images, 784), and their digits, (clients, images).

    ``known`` is what weights that nobody trains make of them, and A B is added to, (clients, images, 784).
    """

    pixels: Tensor
    digits: Tensor
    known: Tensor | None = None

    def pooled(self) -> "Images":
        """The same at a single client."""
        return Images(self.pixels.reshape(1, -1, PIXELS), self.digits.reshape(1, -1))


def split(images: list[Tensor], train: int, evaluated: int, seed: int = 0) -> tuple[Images, Images, Images]:
    """Images to train on, to choose a learning rate by, and to test on; one digit per client, equally many of each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [of[torch.randperm(len(of), generator=generator)[: train + 2 * evaluated]] for of in images]
    parts = [torch.stack(part) for part in zip(*(d.split([train, evaluated, evaluated]) for d in drawn), strict=True)]
    first, second, third = (Images(p, torch.arange(len(p))[:, None].expand(p.shape[:2])) for p in parts)
    return first, second, third


def start(seed: int) -> tuple[Tensors, Tensor]:
    """A and B as they are drawn, and W_out (784, 10): uniform up to 1 / sqrt(inputs), as torch begins a linear layer.

    B is not zero as in LoRA: ReLU has no gradient there.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int, inputs: int) -> Tensor:
        bound = inputs**-0.5
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return {A: drawn(RANK, PIXELS, PIXELS), B: drawn(PIXELS, RANK, RANK)}, drawn(PIXELS, 10, PIXELS)


def batches(size: int, order: torch.Generator) -> Iterator[Tensor]:
    """A round's batches, each the places of some of a client's ``size`` images: so many epochs."""
    for _ in range(EPOCHS):
        yield from torch.randperm(size, generator=order).split(BATCH)


def federate(
    rule: Rule,
    rate: float,
    images: Images,
    state: Tensors,
    out: Tensor,
    rounds: int,
    seed: int,
    batches: Callable[[int, torch.Generator], Iterable[Tensor]] = batches,
) -> Iterator[Tensors]:
    """The global state after every round."""
    order = torch.Generator().manual_seed(seed)
    clients, size = images.digits.shape
    for number in range(1, rounds + 1):
        active = rule.active(number, state)
        stacked = {name: tensor.expand(clients, *tensor.shape) for name, tensor in state.items()}
        sent = train(stacked, active, rate, images, out, batches(size, order))
        updates = (Update(f"client-{k}", size, {n: t[k] for n, t in sent.items()}) for k in range(clients))
        state = rule.aggregate(number, state, updates).state
        yield state


def train(
    state: Tensors, active: list[str], rate: float, images: Images, out: Tensor, steps: Iterable[Tensor]
) -> Tensors:
    """One round of plain SGD at all clients at once; the active tensors, each (clients, ...).

    The gradient of the mean cross-entropy is written out: three times as fast as autograd for so small a model.
    """
    a, b = state[A].clone(), state[B].clone()
    for rows in steps:
        pixels, labels = images.pixels[:, rows], images.digits[:, rows]
        low = pixels @ a.mT
        hidden = low @ b.mT
        if images.known is not None:
            hidden += images.known[:, rows]
        hidden.relu_()
        error = (hidden @ out).softmax(-1).sub_(functional.one_hot(labels, 10)).div_(len(rows))
        back = (error @ out.T).mul_(hidden > 0)
        back_low = back @ b
        if B in active:
            b.baddbmm_(back.mT, low, alpha=-rate)
        if A in active:
            a.baddbmm_(back_low.mT, pixels, alpha=-rate)
    return {name: {A: a, B: b}[name] for name in active}


def forward(images: Images, state: Tensors, out: Tensor) -> Tensor:
    """Logits (clients, images, 10)."""
    hidden = images.pixels @ state[A].mT @ state[B].mT
    if images.known is not None:
        hidden += images.known
    return (hidden.relu_().reshape(-1, PIXELS) @ out).reshape(*images.digits.shape, 10)


def accuracy(state: Tensors, out: Tensor, images: Images) -> float:
    """Share of images whose digit is told, in per cent; 0 for a state that is not finite."""
    logits = forward(images, state, out)
    return 100 * float((logits.argmax(-1) == images.digits).float().mean()) if logits.isfinite().all() else 0.0


def result(method: str, rate: float, seed: int, rounds: int, parts: tuple[Images, Images]) -> float:
    """Accuracy on ``parts[1]`` after training on ``parts[0]``; 0 when training diverged."""
    torch.set_num_threads(1)
    state, out = start(seed)
    images = parts[0].pooled() if method == "centralised" else parts[0]
    try:
        for reached in federate(METHODS[method][0](), rate, images, state, out, rounds, seed):
            state = reached
    except AggregationError:  # a factor is not finite: it diverged
        return 0.0
    return accuracy(state, out, parts[1])


def measured(method: str, images: list[Tensor], pool: ProcessPoolExecutor) -> list[dict[str, Cell]]:
    """A method at the common rate, and at the one that suits it best on the validation images: test accuracy."""
    train_, validation, test = split(images, TRAIN, EVALUATED)
    rule, rates = METHODS[method]
    chosen_by = (repeat(SEEDS), repeat(SELECTION_ROUNDS), repeat((train_, validation)))
    tried = list(pool.map(result, repeat(method), rates, *chosen_by))
    best = rates[tried.index(max(tried))]
    print(method, dict(zip(rates, tried, strict=True)), flush=True)
    state = start(0)[0]
    sent = sum(4 * state[name].numel() for number in range(1, ROUNDS + 1) for name in rule().active(number, state))
    rows: list[dict[str, Cell]] = []
    found: dict[float, list[float]] = {}
    for of, rate in (("common", COMMON_RATE), ("own", best)):
        if rate not in found:
            seeds = (range(SEEDS), repeat(ROUNDS), repeat((train_, test)))
            found[rate] = list(pool.map(result, repeat(method), repeat(rate), *seeds))
        reached = found[rate]
        print(method, rate, reached, flush=True)
        rows.append(
            {
                "rate": of,
                "method": method,
                "learning rate": rate,
                "accuracy %": mean(reached),
                "deviation": stdev(reached),
                "lowest": min(reached),
                "highest": max(reached),
                "published": PUBLISHED[method] if of == "common" else None,
                "MB up per client": None if method == "centralised" else sent / 1e6,
            }
        )
    return rows


def table(rows: list[dict[str, Cell]]) -> Table:
    """The table, with notes on how to read the columns."""
    return Table(
        f"MNIST with one digit per client after {ROUNDS} rounds (RoLoRA, section 4.2), {SEEDS} seeds",
        sorted(rows, key=lambda row: str(row["rate"])),
        [
            f"{TRAIN} training images of each digit, {EVALUATED} to choose the own rate by (another seed, "
            f"{SELECTION_ROUNDS} rounds), {EVALUATED} to test on;",
            f"{EPOCHS} local epochs of SGD, batch {BATCH}. The paper: 6,000 images of each digit, 5 epochs, batch 64.",
        ],
    )


def run() -> Table:
    """Every method."""
    images = digits()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return table([row for method in METHODS for row in measured(method, images, pool)])
