"""One of four sites takes five times as long: rounds that wait, rounds with a deadline, and buffered rounds.

Simulated: a training takes 60 seconds at three sites and 300 at the fourth, and nothing else takes time. The sites
train a softmax on scikit-learn's handwritten digits by plain SGD, once with like rows, once each with digits of its
own, so that the slow one alone has two of them. Aggregation, the change of an old update and its weight are the
product's own; there are no messages.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from benchmarks.table import Cell, Table
from strategies.combine.stale import staleness
from strategies.fedftg import FedFTGRule
from strategies.rule import Tensors, Update

DIGITS = {"north": (0, 1, 2), "east": (3, 4, 5), "south": (6, 7), "west": (8, 9)}
SECONDS = {"north": 60, "east": 60, "south": 60, "west": 300}
END, SEEDS, STEPS, BATCH, RATE, TEST = 40 * 60, 5, 20, 16, 0.05, 400
WEIGHT = "softmax.weight"  # (10 digits, 64 pixels and a one)


@dataclass(frozen=True)
class Way:
    """A cohort: how many updates make a round, after how many seconds it closes, and the largest age of an update."""

    name: str
    size: int
    deadline: int | None = None
    max_age: int = 0


WAYS = (
    Way("rounds", 4),
    Way("rounds, round_deadline 90", 4, deadline=90),
    Way("buffered, size 3, max_age 8", 3, max_age=8),
    Way("buffered, size 2, max_age 16", 2, max_age=16),
    Way("buffered, size 1, max_age 32", 1, max_age=32),
)
Data = tuple[Tensor, Tensor]  # pixels (rows, 65), digits (rows,)


def data(seed: int, *, alike: bool) -> tuple[dict[str, Data], Data]:
    """The sites' rows, and the rows of all digits that a state is scored on."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    pixels = torch.from_numpy(found.data).float()[order] / 16
    pixels, digits = torch.cat([pixels, torch.ones(len(pixels), 1)], 1), torch.from_numpy(found.target)[order]
    rest, test = (pixels[TEST:], digits[TEST:]), (pixels[:TEST], digits[:TEST])
    dealt = torch.arange(len(rest[1])) % len(DIGITS)
    chosen = {
        site: dealt == number if alike else torch.isin(rest[1], torch.tensor(own))
        for number, (site, own) in enumerate(DIGITS.items())
    }
    return {site: (rest[0][rows], rest[1][rows]) for site, rows in chosen.items()}, test


def trained(weight: Tensor, rows: Data, seed: int) -> Tensor:
    """The weight (10, 65) after a round's steps at one site."""
    weight, generator = weight.clone().requires_grad_(), torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = torch.randint(len(rows[1]), (BATCH,), generator=generator)
        loss = functional.cross_entropy(rows[0][batch] @ weight.T, rows[1][batch])
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - RATE * gradient).detach().requires_grad_()
    return weight.detach()


def states(way: Way, sites: dict[str, Data], seed: int) -> Iterator[tuple[int, Tensor]]:
    """Every state with the second in which it was made."""
    rule, now, number = FedFTGRule(), 0, 1
    state: Tensors = {WEIGHT: torch.zeros(10, 65)}
    work: dict[str, tuple[int, int, Tensors]] = {}  # by site: when it is done, its round, its state
    yield 0, state[WEIGHT]
    while now < END:
        work |= {site: (now + SECONDS[site], number, state) for site in sites.keys() - work}
        closes = None if way.deadline is None else now + way.deadline
        updates: list[Update] = []
        while len(updates) < way.size:
            site = min(work, key=lambda one: (work[one][0], one))
            if closes is not None and work[site][0] > closes:
                now = closes
                break
            now, began, start = work.pop(site)
            age = number - began
            if age > way.max_age:  # with a deadline: the answer to an earlier round
                work[site] = (now + SECONDS[site], number, state)
                continue
            came = {WEIGHT: trained(start[WEIGHT], sites[site], [*SECONDS].index(site) + 10 * began + 10_000 * seed)}
            update = Update(site, len(sites[site][1]), came)
            carried = rule.carried_over(replace(update, age=age), start, state, staleness(age)) if age else update
            updates.append(carried)
        state, number = rule.aggregate(number, state, iter(updates)).state, number + 1
        yield now, state[WEIGHT]


def run() -> Table:
    """Every way with every seed, with like rows and with each site's own."""
    table = Table(
        "One of four sites takes five times as long (simulated)",
        notes=[
            f"Means of {SEEDS} seeds. Training takes 60 s at three sites, 300 s at the fourth, the rest no time.",
            "Loss: on all digits. Slow: accuracy on 8 and 9, which with own digits the slow site alone has. One rate.",
        ],
    )
    for alike in (True, False):
        found = {way.name: [_curve(way, seed, alike=alike) for seed in range(SEEDS)] for way in WAYS}
        goals = [curve[-1][1] for curve in found["rounds"]]
        table.rows += [_row(name, curves, goals, alike=alike) for name, curves in found.items()]
    return table


def _curve(way: Way, seed: int, *, alike: bool) -> list[tuple[float, float, float]]:
    """Minute, loss and accuracy on the slow site's digits of every state."""
    sites, test = data(seed, alike=alike)
    return [(at / 60, *_scores(weight, test)) for at, weight in states(way, sites, seed)]


def _row(
    name: str, curves: list[list[tuple[float, float, float]]], goals: list[float], *, alike: bool
) -> dict[str, Cell]:
    row: dict[str, Cell] = {"rows": "alike" if alike else "own digits", "cohort": name}
    row["rounds a minute"] = round((len(curves[0]) - 1) / curves[0][-1][0], 2)
    for minute in (5, 10, 20, 40):
        row[f"loss, {minute} min"] = round(mean(_at(curve, minute)[1] for curve in curves), 3)
    row["slow, 40 min"] = round(mean(_at(curve, 40)[2] for curve in curves), 3)
    times = [next((at for at, loss, _ in c if loss <= goal), None) for c, goal in zip(curves, goals, strict=True)]
    reached = [at for at in times if at is not None]
    row["minutes to the last loss of rounds"] = round(mean(reached), 1) if len(reached) == len(curves) else None
    return row


def _scores(weight: Tensor, test: Data) -> tuple[float, float]:
    """Loss on all test rows, and accuracy on the slow site's digits."""
    logits = test[0] @ weight.T
    slow = torch.isin(test[1], torch.tensor(DIGITS["west"]))
    right = (logits.argmax(1) == test[1])[slow].float().mean()
    return float(functional.cross_entropy(logits, test[1])), float(right)


def _at(curve: list[tuple[float, float, float]], minute: float) -> tuple[float, float, float]:
    return next(one for one in reversed(curve) if one[0] <= minute)
