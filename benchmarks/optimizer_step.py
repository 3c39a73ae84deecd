"""A training step of TinyLlama's MLP matrices: ours against galore-torch's AdamW and torch's, time and memory.

Each optimizer runs in a process of its own, so that the peak of its memory is its own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from benchmarks.table import Cell, Table
from common.system.machine import resident_peak

RANK, BLOCKS, TOKENS, STEPS, LR = 128, 3, 64, 8, 1e-4
OPTIMIZERS = ("none", "ours", "ours, shared", "ours, 8bit", "galore-torch", "torch AdamW")


class Block(nn.Module):
    """The MLP of one TinyLlama block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2048, 5632, bias=False)
        self.gate = nn.Linear(2048, 5632, bias=False)
        self.down = nn.Linear(5632, 2048, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU with a residual."""
        y: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def run() -> Table:
    """One process for each."""
    found = {name: _in_process(name) for name in OPTIMIZERS}
    bare, peer = found["none"], found["galore-torch"]
    rows: list[dict[str, Cell]] = []
    for name in OPTIMIZERS[1:]:
        one = found[name]
        step, first = one["ms"] - bare["ms"], one["first"] - bare["ms"]
        row: dict[str, Cell] = {"optimizer": name, "step ms": step, "step with refresh ms": first}
        row |= {"galore-torch / it, refresh": (peer["first"] - bare["ms"]) / first}
        row |= {"galore-torch / it, step": (peer["ms"] - bare["ms"]) / step}
        row |= {
            "state MB": one["state"] / 1e6,
            "peak MB": one["peak"] / 1e6,
            "galore-torch / it, peak": peer["peak"] / one["peak"],
        }
        rows.append(row)
    return Table(
        f"Optimizer steps on {BLOCKS} of TinyLlama's MLPs (104 million weights, float32), rank {RANK}",
        rows,
        [
            f"ms: of an iteration on {TOKENS} tokens less one without ({bare['ms']:.0f}), best of {STEPS - 1}.",
            "peak MB: resident memory above that of the model with its inputs, gradients and optimizer state included.",
        ],
    )


def _in_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.optimizer_step", name]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str) -> dict[str, float]:
    """Time and memory of one optimizer, in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    x = torch.randn(TOKENS, 2048)
    optimizer = make(name, model)
    with torch.no_grad():
        model(x)
    before = psutil.Process().memory_info().rss
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        _iterate(model, optimizer, x)
        times.append(time.perf_counter() - started)
    peak = resident_peak() - before
    state = 0
    if optimizer is not None:
        held = [v for s in optimizer.state.values() for v in s.values()]
        flat = [t for v in held for t in (v if isinstance(v, list) else [v, getattr(v, "ortho_matrix", None)])]
        state = sum(t.nbytes for t in flat if isinstance(t, Tensor))
    return {"first": 1e3 * times[0], "ms": 1e3 * min(times[1:]), "peak": float(peak), "state": float(state)}


def make(name: str, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer of that name over all of the model's matrices."""
    if name == "none":
        return None
    if name == "torch AdamW":
        return torch.optim.AdamW(model.parameters(), lr=LR)
    if name == "galore-torch":
        from galore_torch import GaLoreAdamW

        group = {
            "params": list(model.parameters()),
            "rank": RANK,
            "update_proj_gap": 200,
            "scale": 0.25,
            "proj_type": "std",
        }
        peer: torch.optim.Optimizer = GaLoreAdamW([group], lr=LR, no_deprecation_warning=True)
        return peer
    from client.training.galore import GaLore
    from common.linalg.subspace import SharedBasis

    return GaLore(
        dict(model.named_parameters()),
        lr=LR,
        rank=RANK,
        update_proj_gap=200,
        scale=0.25,
        moments="8bit" if "8bit" in name else "float32",
        basis=SharedBasis(0, 1, RANK) if "shared" in name else None,
    )


def _iterate(model: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor) -> None:
    from client.training.galore import GaLore

    if isinstance(optimizer, GaLore):
        with optimizer.projecting():
            model(x).square().mean().backward()
    else:
        model(x).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
