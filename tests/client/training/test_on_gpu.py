"""Packed rows, GaLore, float16 and lack of memory on a CUDA device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from client.training.galore import GaLore
from client.training.ranks import Ranks
from client.training.trainer import TrainResult, train
from common.config.training import TrainingConfig
from common.data.chat import causal_loss_sum, collate
from common.data.packing import packing_of
from tests.common.data.test_packing import ROWS, made

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)


def trained(device: torch.device, autocast: torch.dtype | None = None) -> tuple[TrainResult, torch.Tensor]:
    """Three steps of GaLore over packed rows; the loss and the change of the weights."""
    model: Any = made("Llama").to(device)
    weights = {name: p for name, p in model.named_parameters() if "_proj" in name}
    before = torch.cat([p.detach().flatten().cpu() for p in weights.values()])
    model.requires_grad_(False)
    for parameter in weights.values():
        parameter.requires_grad_(True)
    packing = packing_of(model, autocast)
    result = train(
        model,
        GaLore(weights, lr=1e-3, rank=4, update_proj_gap=200, scale=1.0, inner="sgd"),
        ROWS,
        lambda some: collate(some, 0, packing),
        causal_loss_sum,
        TrainingConfig(learning_rate=1e-3, local_steps=3, batch_size=5, max_grad_norm=None),
        server_round=1,
        rounds=1,
        max_batch_size=None,
        ranks=Ranks([device]),
        autocast=autocast,
        seed="s",
    )
    return result, torch.cat([p.detach().flatten().cpu() for p in weights.values()]) - before


def test_training_is_that_of_the_cpu() -> None:
    (here, change), (there, other) = trained(CUDA), trained(torch.device("cpu"))
    assert here.loss == pytest.approx(there.loss, rel=1e-4)
    assert float((change - other).norm() / other.norm()) < 1e-2
    assert here.peak_memory_bytes > 0


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_half_precision_trains_near_float32(autocast: torch.dtype) -> None:
    assert trained(CUDA, autocast)[0].loss == pytest.approx(trained(CUDA)[0].loss, rel=0.05)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-NeoX, Pythia"])
def test_packed_rows_have_the_loss_of_padded_ones(name: str) -> None:
    model = made(name).to(CUDA)
    found = []
    for way in (None, packing_of(model, None)):
        batch = {key: value.to(CUDA) for key, value in collate(ROWS, 0, way).items()}
        found.append(causal_loss_sum(model, batch)[0].item())
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A quarter of a GB for this process."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(250e6 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_step_that_runs_out_of_memory_is_made_with_fewer_rows() -> None:
    model = torch.nn.Linear(1, 4_000_000, device=CUDA)  # 16 MB a row, several times
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def rows(some: list[float]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(some)[:, None], "labels": torch.zeros(len(some), dtype=torch.long)}

    def loss_sum(layer: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return layer(batch["x"]).square().sum(), len(batch["x"])

    config = TrainingConfig(learning_rate=1e-9, local_steps=1, batch_size=8)
    how: dict[str, Any] = {"server_round": 1, "rounds": 1, "max_batch_size": None, "autocast": None, "seed": "s"}
    result = train(model, optimizer, [0.1] * 8, rows, loss_sum, config, ranks=Ranks([CUDA]), **how)
    assert 1 <= result.micro_batch < 8
