"""The local loop: accumulation is exact, the schedule runs over the whole federation, every row is used."""

import gc
import itertools
import math
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from client.training.galore import GaLore
from client.training.passes import Batch
from client.training.ranks import Ranks
from client.training.trainer import _shuffled, schedule_factor, train
from common.config.training import TrainingConfig
from common.errors import TrainingError

Row = tuple[list[float], list[int]]


def settings(**changes: object) -> TrainingConfig:
    base: dict[str, object] = {"learning_rate": 0.1, "local_steps": 3, "batch_size": 4, "max_grad_norm": None}
    return TrainingConfig.model_validate({**base, **changes})


def rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of different length: ``length`` inputs and as many labels, some of them not counted."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        x = torch.randn(1 + i % 3, generator=generator)
        out.append((x.tolist(), [0 if j % 2 == 0 else -100 for j in range(len(x))]))
    return out


def collate(batch: list[Row]) -> Batch:
    width = max(len(x) for x, _ in batch)
    pad = [width - len(x) for x, _ in batch]
    return {
        "x": torch.tensor([x + [0.0] * p for (x, _), p in zip(batch, pad, strict=True)]),
        "labels": torch.tensor([y + [-100] * p for (_, y), p in zip(batch, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * p for (x, _), p in zip(batch, pad, strict=True)]),
    }


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    counted = batch["labels"] != -100
    error = (model(batch["x"].unsqueeze(-1)).squeeze(-1) - 1.0).square()
    return (error * counted).sum(), int(counted.sum())


def run(config: TrainingConfig, count: int = 8, **options: Any) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    defaults: dict[str, Any] = {"server_round": 1, "rounds": 2, "max_batch_size": None, "seed": "s"}
    result = train(
        model,
        torch.optim.SGD(model.parameters(), lr=config.learning_rate),
        rows(count),
        collate,
        loss_sum,
        config,
        ranks=Ranks([torch.device("cpu")]),
        autocast=None,
        **{**defaults, **options},
    )
    return [p.item() for p in model.parameters()], result


@pytest.mark.parametrize("same", [{"max_batch_size": 3}, {"max_batch_size": 1}])
def test_cap_on_the_batch_changes_nothing_but_memory(same: dict[str, int]) -> None:
    assert run(settings(), **same)[0] == pytest.approx(run(settings())[0], rel=1e-6)


def test_accumulation_equals_one_large_batch() -> None:
    accumulated = run(settings(batch_size=2, gradient_accumulation=2))[0]
    assert accumulated == pytest.approx(run(settings(batch_size=4))[0], rel=1e-6)


def test_one_step_is_gradient_descent_on_the_mean_over_counted_tokens() -> None:
    after, result = run(settings(local_steps=1, batch_size=8))
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    w, b = (p.item() for p in model.parameters())
    inputs = [v for x, y in rows(8) for v, label in zip(x, y, strict=True) if label != -100]
    errors = [w * v + b - 1.0 for v in inputs]
    n = len(inputs)
    assert result.loss == pytest.approx(sum(e * e for e in errors) / n)
    grad_w = sum(2 * e * v for e, v in zip(errors, inputs, strict=True)) / n
    assert after == pytest.approx([w - 0.1 * grad_w, b - 0.1 * sum(2 * e for e in errors) / n], rel=1e-5)


def test_epochs_take_every_row_once_each() -> None:
    result = run(settings(local_steps=None, local_epochs=2, batch_size=3), count=8)[1]
    assert result.steps == 6  # 3 + 3 + 2 rows, twice
    assert result.tokens == 2 * sum(len(x) for x, _ in rows(8))


def test_same_seed_same_result_and_other_seed_other_order() -> None:
    assert run(settings())[0] == run(settings())[0]
    assert run(settings())[0] != run(settings(), seed="t")[0]


@pytest.mark.parametrize("carry_over", [True, False])
def test_order_covers_all_rows_in_every_pass(carry_over: bool) -> None:
    taken = list(itertools.chain.from_iterable(itertools.islice(_shuffled(5, 2, "x", carry_over=carry_over), 15)))
    assert sorted(taken[:5]) == sorted(taken[5:10]) == [0, 1, 2, 3, 4]
    assert taken[:5] != taken[5:10]


def test_schedule_spans_all_rounds() -> None:
    linear = settings(schedule="linear", warmup=0.5)
    assert schedule_factor(linear, 0.25) == 0.5
    assert schedule_factor(linear, 0.5) == 1.0
    assert schedule_factor(linear, 0.75) == 0.5
    assert schedule_factor(settings(schedule="cosine"), 0.5) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert schedule_factor(settings(), 0.9) == 1.0
    assert schedule_factor(linear, 0.0) > 0


def test_learning_rate_continues_in_the_next_round() -> None:
    config = settings(schedule="linear", local_steps=2)
    rates = [run(config, server_round=r)[1].learning_rate for r in (1, 2)]
    assert rates == pytest.approx([0.1 * 0.75, 0.1 * 0.25])


def test_loss_that_is_not_finite_stops_with_the_place() -> None:
    with pytest.raises(TrainingError, match=r"round 2, step [23]; lower training.learning_rate"):
        run(settings(learning_rate=1e30), server_round=2)


def galore_run(refresh_batches: int, count: int = 40) -> tuple[Tensor, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False), nn.Linear(8, 1))
    options = {"lr": 0.1, "rank": 2, "update_proj_gap": 2, "scale": 1.0, "refresh_batches": refresh_batches}
    optimizer = GaLore({"w": model[2].weight}, **options)  # type: ignore[arg-type, dict-item]
    result = train(
        model,
        optimizer,
        rows(count),
        collate,
        loss_sum,
        settings(local_steps=4, batch_size=2),
        server_round=1,
        rounds=1,
        max_batch_size=1,
        ranks=Ranks([torch.device("cpu")]),
        autocast=None,
        seed="s",
    )
    return model[2].weight.detach(), result  # type: ignore[return-value]


def test_bases_from_several_batches_cost_their_passes_and_nothing_else() -> None:
    """Two refreshes in four steps; with 3 batches each that is 6 more, of 2 rows of 1 to 3 tokens."""
    one, three = galore_run(1)[1], galore_run(3)[1]
    assert one.steps == three.steps == 4
    assert one.loss_first == three.loss_first  # the step's own rows are the same
    assert 6 * 2 * 1 <= three.tokens - one.tokens <= 6 * 2 * 3
    assert not torch.equal(galore_run(1)[0], galore_run(3)[0])
    assert torch.equal(galore_run(3)[0], galore_run(3)[0])


def half_run(loss_scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    """Two steps of SGD in bases from two batches, in float16 arithmetic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False), nn.Linear(8, 1))
    model[2].to(dtype)
    options: dict[str, Any] = {"rank": 2, "update_proj_gap": 9, "scale": 1.0, "refresh_batches": 2, "inner": "sgd"}
    optimizer = GaLore({"w": model[2].weight}, lr=0.1 / loss_scale, **options)  # type: ignore[dict-item]

    def scaled(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        summed, counted = loss_sum(model, batch)
        return summed.float() * loss_scale, counted

    result = train(
        model,
        optimizer,
        rows(40),
        collate,
        scaled,
        settings(local_steps=2),
        server_round=1,
        rounds=1,
        max_batch_size=None,
        ranks=Ranks([torch.device("cpu")]),
        autocast=torch.float16,
        seed="s",
    )
    return optimizer.state[model[2].weight]["bases"][-1], result  # type: ignore[return-value, index]


@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
def test_bases_are_taken_at_a_lower_scale_where_float16_overflows(loss_scale: float) -> None:
    """The same, whatever the scale was at the start: 2^16, which overflows here."""
    torch.testing.assert_close(half_run(loss_scale)[0], half_run(2.0**-9)[0], rtol=0.05, atol=0.02)


def test_float16_weights_are_refused_where_gradients_are_scaled() -> None:
    with pytest.raises(TrainingError, match=r"with `model.dtype` float16: `precision` float32 or bfloat16; with"):
        half_run(1.0, torch.float16)


def cuda_runs_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def cpu_runs_out() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def fail_above(model: nn.Sequential, most: int, *, passes: int, where: str, error: Any = cuda_runs_out) -> None:
    """From the given forward pass on, more than ``most`` rows fail: there, or when backward reaches layer 2."""
    seen = itertools.count(1)

    def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
        too_large = next(seen) >= passes and len(inputs[0]) > most
        if too_large and where == "forward":
            error()
        module.too_large = too_large

    def after(module: nn.Module, inputs: object, output: Tensor) -> None:
        if model.too_large and where == "backward":
            output.register_hook(lambda gradient: error())

    model.register_forward_pre_hook(before)
    model[2].register_forward_hook(after)


def deep_run(cap: int | None, optimizer: str, refresh_batches: int = 1, **fault: Any) -> tuple[list[Tensor], Any]:
    """Four steps of 8 rows; GaLore refreshes at the first and the third."""
    torch.manual_seed(0)
    layers = [nn.Linear(1, 12), nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 1)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))
    if fault:
        fail_above(model, **fault)
    weights = {"up": layers[1].weight, "down": layers[2].weight}
    options: dict[str, Any] = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "refresh_batches": refresh_batches}
    made = GaLore(weights, lr=0.02, **options) if optimizer == "galore" else torch.optim.AdamW(model.parameters(), 0.02)
    result = train(
        model,
        made,
        rows(40),
        collate,
        loss_sum,
        settings(local_steps=4, gradient_accumulation=2, learning_rate=0.02, max_length=99),
        server_round=3,
        rounds=3,
        max_batch_size=cap,
        ranks=Ranks([torch.device("cpu")]),
        autocast=None,
        seed="s",
    )
    return [p.detach() for p in model.parameters()], result


# Forward passes before memory runs out for good: a step has two, a refresh from three batches six more.
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("optimizer", "refresh_batches", "passes"),
    [
        *[("adamw", 1, passes) for passes in (1, 2, 6)],
        *[("galore", 1, passes) for passes in (1, 2, 4, 6)],  # the first and last part of a refresh's step; between
        *[("galore", 3, passes) for passes in (1, 4, 6, 8, 10, 15)],  # in the refresh, and after it
    ],
)
def test_step_that_ran_out_of_memory_is_made_anew_with_fewer_rows_per_pass(
    optimizer: str, refresh_batches: int, passes: int, where: str
) -> None:
    found, result = deep_run(None, optimizer, refresh_batches, most=2, passes=passes, where=where)
    expected, small = deep_run(2, optimizer, refresh_batches)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert result.loss == pytest.approx(small.loss, rel=1e-6)
    assert (result.micro_batch, result.tokens) == (2, small.tokens)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [cuda_runs_out, cpu_runs_out])
def test_row_that_does_not_fit_is_told_with_its_place(error: Any, where: str) -> None:
    says = r"out of memory in round 3, step 2: one row of up to 99 tokens does not fit on cpu; lower training.max_len"
    with pytest.raises(TrainingError, match=says) as caught:
        deep_run(None, "adamw", most=0, passes=3, where=where, error=error)
    assert caught.value.__context__ is None


def test_other_errors_of_pytorch_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        deep_run(None, "adamw", most=2, passes=1, where="forward", error=lambda: torch.ones(2) + torch.ones(3))


def test_tensors_of_a_failed_pass_are_freed_before_the_next() -> None:
    held: list[weakref.ref[Tensor]] = []

    def fail(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        assert all(tensor() is None for tensor in held)
        summed, counted = loss_sum(model, batch)
        if len(batch["x"]) > 1:
            held.extend(weakref.ref(tensor) for tensor in (summed, *batch.values()))
            cuda_runs_out()
        return summed, counted

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"server_round": 1, "rounds": 1, "max_batch_size": None, "autocast": None, "seed": "s"}
    gc.disable()
    try:
        train(model, optimizer, rows(8), collate, fail, settings(), ranks=Ranks([torch.device("cpu")]), **options)
    finally:
        gc.enable()
    assert len(held) == 2 * 4  # of 4 rows, and of 2


def test_rows_of_like_length_share_a_pass_and_the_step_is_the_same() -> None:
    widths: list[int] = []

    class Text(NamedTuple):
        input_ids: list[float]
        labels: list[int]

    def padded(batch: list[Text]) -> Batch:
        widths.append(max(len(row.input_ids) for row in batch))
        return collate([tuple(row) for row in batch])

    found = []
    for cap in (None, 2):
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        options: dict[str, Any] = {"server_round": 1, "rounds": 1, "max_batch_size": cap, "autocast": None, "seed": "s"}
        texts, cpu = [Text(*row) for row in rows(8)], torch.device("cpu")
        optimizer, how = torch.optim.SGD(model.parameters(), lr=0.1), settings(batch_size=8, local_steps=1)
        train(model, optimizer, texts, padded, loss_sum, how, ranks=Ranks([cpu]), **options)
        found.append(model.weight.item())
    assert widths == [3, 1, 2, 2, 3]  # of lengths 1, 1, 1, 2, 2, 2, 3, 3
    assert found[0] == pytest.approx(found[1], rel=1e-6)
