"""Several ranks, here threads that are connected by gloo, train as one process does (decision 037)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.training.galore import GaLore
from client.training.passes import Batch
from client.training.ranks import Connected, Ranks
from client.training.trainer import TrainResult, train
from common.config.training import TrainingConfig
from common.errors import DivergedError, TrainingError, WorkerDied
from common.linalg.subspace import SharedBasis

CPU = torch.device("cpu")
Row = tuple[list[float], int]
Weights = dict[str, Tensor]
Make = Callable[[nn.Module], torch.optim.Optimizer]
Trained = tuple[Weights, TrainResult]


class Net(nn.Module):
    """Two matrices that every row reaches, and one that only rows with a positive first input do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down, self.rare = (nn.Parameter(torch.randn(8, 8, generator=generator) / 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(x @ self.up) @ self.down
        some = x[:, 0] > 0
        return torch.where(some[:, None], out + x @ self.rare, out) if some.any() else out


def rows(count: int) -> list[Row]:
    """Rows with a label to count or not; only the first has a positive first input."""
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(count, 8, generator=generator)
    found[:, 0] = -found[:, 0].abs()
    found[0, 0] = 1.0
    return [(x.tolist(), -100 if i % 5 == 4 else i % 8) for i, x in enumerate(found)]


def collate(batch: list[Row]) -> Batch:
    return {"x": torch.tensor([x for x, _ in batch]), "labels": torch.tensor([y for _, y in batch])}


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    loss = nn.functional.cross_entropy(model(batch["x"]), batch["labels"], ignore_index=-100, reduction="sum")
    return loss, int((batch["labels"] != -100).sum())


def galore(basis: SharedBasis | None = None, **options: Any) -> Make:
    common: dict[str, Any] = {"lr": 0.05, "rank": 2, "update_proj_gap": 3, "scale": 0.5, "max_grad_norm": 0.4}
    return lambda model: GaLore(dict(model.named_parameters()), basis=basis, **{**common, **options})


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def run(ranks: Ranks, make: Make, loss: Any = loss_sum, **options: Any) -> Trained:
    """One round on this rank; the weights afterwards."""
    model = Net()
    base: dict[str, Any] = {"learning_rate": 0.05, "local_steps": 5, "batch_size": 6, "max_grad_norm": 0.4}
    own = {key: options.pop(key) for key in list(options) if key in TrainingConfig.model_fields}
    config = TrainingConfig.model_validate({**base, **own})
    known: dict[str, Any] = {"server_round": 1, "rounds": 1, "max_batch_size": None, "seed": "s", "autocast": None}
    result = train(model, make(model), rows(14), collate, loss, config, ranks=ranks, **{**known, **options})
    return {name: p.detach().clone() for name, p in model.named_parameters()}, result


def together(folder: Path, work: Callable[[Ranks], Any], size: int = 2) -> list[Any]:
    """The work's result at every rank."""

    def one(rank: int) -> Any:
        return work(Connected(folder / "meeting", [CPU] * size, rank, 20.0))

    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(size) as threads:
        return [future.result() for future in [threads.submit(one, rank) for rank in range(size)]]


def alike(one: Weights, two: Weights) -> bool:
    return all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)


SHARED = SharedBasis(seed=3, server_round=1, rank=2)
METHODS = {
    # One row's gradient has one direction: Adam would scale up the rounding errors in any other.
    "own bases": galore(unprojected=["rare"], weight_decay=0.1),
    "own bases of one direction": galore(rank=1),
    "own bases, sgd": galore(inner="sgd", scale=2.0),
    "own bases of several batches": galore(unprojected=["rare"], refresh_batches=3),
    "shared basis": galore(SHARED),
    "dense": adamw,
}


@pytest.mark.parametrize("go_on", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one(tmp_path: Path, method: str, go_on: bool) -> None:
    alone, told = run(Ranks([CPU]), METHODS[method], go_on=go_on)
    (first, result), (second, _) = together(tmp_path, lambda ranks: run(ranks, METHODS[method], go_on=go_on))
    assert not alike(alone, {name: p.detach() for name, p in Net().named_parameters()})
    assert alike(first, alone)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (result.loss, result.loss_last) == pytest.approx((told.loss, told.loss_last), rel=1e-6)
    assert (result.tokens, result.steps) == (told.tokens, told.steps)


def test_more_ranks_than_rows_of_the_last_step(tmp_path: Path) -> None:
    """14 rows in steps of 6: the last step has 2, so one of three ranks has none."""
    options = {"local_steps": None, "local_epochs": 2}
    alone, told = run(Ranks([CPU]), galore(rank=1), **options)
    for weights, result in together(tmp_path, lambda ranks: run(ranks, galore(rank=1), **options), size=3):
        assert alike(weights, alone)
        assert result.tokens == told.tokens == 28


def test_accumulation_over_micro_batches_changes_nothing(tmp_path: Path) -> None:
    alone, _ = run(Ranks([CPU]), METHODS["own bases"])
    (weights, result), _ = together(tmp_path, lambda ranks: run(ranks, METHODS["own bases"], max_batch_size=1))
    assert alike(weights, alone)
    assert result.micro_batch == 1


def test_bfloat16_arithmetic_stays_close(tmp_path: Path) -> None:
    alone, _ = run(Ranks([CPU]), galore(SHARED), autocast=torch.bfloat16)
    (weights, _), _ = together(tmp_path, lambda ranks: run(ranks, galore(SHARED), autocast=torch.bfloat16))
    assert all(torch.allclose(weights[name], alone[name], atol=2e-2) for name in alone)


class Counting(Connected):
    """Counts the numbers that travel."""

    summed = based = 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self.summed += sum(tensor.numel() for tensor in tensors)
        super().sum(tensors)

    def sum_at_first(self, tensor: Tensor) -> None:
        self.based += tensor.numel()
        super().sum_at_first(tensor)


def test_projected_gradients_travel_not_whole_ones(tmp_path: Path) -> None:
    """5 steps of R, 8 x 2 of three weights, and 2 refreshes with the whole 8 x 8."""
    for name, basis, refreshes in (("own", None, 2), ("shared", SHARED, 0)):
        (tmp_path / name).mkdir()

        def counted(rank: int, name: str = name, basis: SharedBasis | None = basis) -> Counting:
            ranks = Counting(tmp_path / name / "meeting", [CPU] * 2, rank, 20.0)
            run(ranks, galore(basis), local_steps=5, batch_size=14)
            return ranks

        with ThreadPoolExecutor(2) as threads:
            for ranks in threads.map(counted, range(2)):
                assert (ranks.summed, ranks.based) == (5 * 3 * 16, refreshes * 3 * 64)


class ShortOfMemory:
    """A loss that runs out of memory with more than so many rows, at one rank alone."""

    def __init__(self, ranks: Ranks, most: int, at: int) -> None:
        self.most = most if ranks.rank == at else 100

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if len(batch["labels"]) > self.most:
            raise torch.OutOfMemoryError("no memory")
        return loss_sum(model, batch)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("method", ["own bases", "own bases of several batches", "shared basis", "dense"])
def test_memory_that_runs_out_at_one_rank_changes_nothing(tmp_path: Path, method: str, at: int) -> None:
    alone, told = run(Ranks([CPU]), METHODS[method])
    short = together(tmp_path, lambda ranks: run(ranks, METHODS[method], ShortOfMemory(ranks, 2, at)))
    for weights, result in short:
        assert alike(weights, alone)
        assert (result.micro_batch, result.tokens) == (1, told.tokens)  # 3 rows do not fit, half of them do


def test_row_that_fits_one_rank_but_not_the_other_ends_the_round_at_both(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str:
        with pytest.raises(TrainingError, match="out of memory in round 1, step 1: one row") as error:
            run(ranks, galore(), ShortOfMemory(ranks, 0, 1))
        return str(error.value)

    one, two = together(tmp_path, work)
    assert one == two


def bad(at: int, ranks: Ranks) -> Any:
    """A loss that is infinite in one rank's second step."""
    calls = []

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        summed, counted = loss_sum(model, batch)
        calls.append(1)
        return (summed * float("inf") if len(calls) == 2 and ranks.rank == at else summed), counted

    return loss


@pytest.mark.parametrize("at", [0, 1])
def test_a_loss_that_diverges_at_one_rank_ends_the_round_at_both(tmp_path: Path, at: int) -> None:
    def work(ranks: Ranks) -> str:
        with pytest.raises(DivergedError, match="in round 1, step 2; lower") as error:
            run(ranks, galore(), bad(at, ranks))
        return str(error.value)

    one, two = together(tmp_path, work)
    assert one == two


@pytest.mark.parametrize("method", ["own bases", "shared basis", "dense"])
def test_going_on_counts_a_bad_loss_as_zero_whoever_has_it(tmp_path: Path, method: str) -> None:
    """As one process that leaves out the same rows."""

    def left_out(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        summed, counted = loss_sum(model, batch)
        calls.append(1)
        return (summed * float("nan") if len(calls) == 4 else summed), counted  # the second step's second pass

    calls: list[int] = []
    alone, told = run(InTurns([CPU]), METHODS[method], left_out, go_on=True, max_batch_size=3)
    for weights, result in together(tmp_path, lambda ranks: run(ranks, METHODS[method], bad(1, ranks), go_on=True)):
        assert result.not_finite == told.not_finite == 1
        assert alike(weights, alone)


class InTurns(Ranks):
    """One process that takes the rows of two ranks one after the other."""

    def mine(self, rows: Sequence[Any]) -> list[Any]:
        return [*rows[0::2], *rows[1::2]]


def test_rank_that_does_not_come_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match="rank 0 has lost the others"):
        Connected(tmp_path / "meeting", [CPU] * 2, 0, 0.5)


def test_rank_that_has_gone_is_noticed(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str | None:
        assert isinstance(ranks, Connected)
        if ranks.rank == 1:
            ranks.close()
            return None
        with pytest.raises(WorkerDied, match="rank 0 has lost the others") as error:
            run(ranks, galore())
        return str(error.value)

    assert together(tmp_path, work)[0]
