"""The preflight's estimate of memory against what a process really takes, on whole and quantised bases.

A process for each case on the CPU reads a Llama-like model of random weights and trains two steps; peaks are of its
resident memory, without what it held before. Linux alone. ``python -m benchmarks memory-peaks``
"""

import ctypes
import json
import multiprocessing
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Cell, Table
from client.preflight.memory import Batch, estimate
from client.training.ranks import Ranks
from client.training.settings import make_optimizer
from client.training.trainer import train
from common.config.federation import FederationConfig
from common.config.section import Quantization
from common.data.chat import Example, causal_loss_sum, collate
from common.data.tasks import make_task
from common.model.quantization import Held
from common.model.tuning import tune
from common.system.machine import resident_peak

#: hidden, intermediate, blocks, heads, heads of keys and values, vocabulary: 16 million weights.
SHAPE = (384, 1024, 8, 6, 2, 8192)
TINY = (64, 128, 3, 4, 2, 300)
STRATEGIES: dict[str, dict[str, Any]] = {
    "FedIT": {"name": "fedit", "modules": "linear", "blocks": "all", "rank": 16},
    "FedFTG": {"name": "fedftg", "modules": "mlp", "blocks": "lower third", "rank": 16},
}
BASES: tuple[Quantization, ...] = ("whole", "int8", "nf4")
ROWS, LENGTH = 4, 128
_RESET = Path("/proc/self/clear_refs")  # "5" forgets the peak of resident memory


def run() -> Table:
    """A process for every strategy and base."""
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="bench-peaks-") as folder:
        for name, shape in (("tiny", TINY), ("model", SHAPE)):
            write_model(Path(folder, name), shape)
        for strategy in STRATEGIES:
            for base, mapped in product(BASES, (False, True)):
                told: dict[str, Cell] = {"strategy": strategy, "base": base, "heap": "mapped" if mapped else "as it is"}
                rows.append(told | case(Path(folder), strategy, base, mapped=mapped))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return Table(
        "Peak memory on a CPU: the preflight's estimate against real processes",
        rows,
        [
            f"Llama-like, 16 million weights, float32, {ROWS} rows of {LENGTH} tokens; MB beside what the process held "
            "with all libraries loaded. Loading: until the model is ready.",
            "heap: mapped: tensors from 64 KiB get pages of their own, which glibc gives back at once.",
        ],
    )


def write_model(folder: Path, shape: tuple[int, ...]) -> None:
    """Random weights, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from deploy.sandbox.tiny import make_tokenizer

    hidden, intermediate, blocks, heads, kv, vocabulary = shape
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary}
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)).save_pretrained(folder)  # type: ignore[arg-type]
    make_tokenizer().save_pretrained(folder)


def case(folder: Path, strategy: str, base: Quantization, *, mapped: bool) -> dict[str, Cell]:
    """Estimate and peaks of one case, from a process of its own, forked from this one with all libraries loaded.

    Args:
        folder: holds ``model``, and ``tiny``, with which the process goes the whole way first: pages of libraries count
            as its own when they are touched.
        strategy: a key of ``STRATEGIES``.
        base: how the base model is held.
        mapped: whether large tensors get pages of their own.
    """
    torch.set_num_threads(1)  # no thread that a fork would lose
    with multiprocessing.get_context("fork").Pool(1) as pool:
        if mapped:
            pool.apply(_map_large_tensors)
        pool.apply(measure, (folder / "tiny", strategy, base))
        return pool.apply(measure, (folder / "model", strategy, base))


def measure(folder: Path, strategy: str, base: Quantization) -> dict[str, Cell]:
    """Load and train in this process."""
    federation = _federation(str(folder), strategy, base)
    task = make_task(federation.task)
    _RESET.write_text("5", encoding="ascii")
    before = resident_peak()
    loaded = task.load(str(folder), None, "float32", 0, Held(base, federation.strategy))
    tuned = tune(loaded.model, federation.strategy, task.peft_type)
    loading = resident_peak() - before
    peak = estimate(tuned, federation, Batch(ROWS, LENGTH, 0.5), 2, None)
    _RESET.write_text("5", encoding="ascii")
    result = train(
        tuned.model,
        make_optimizer(tuned.parameters, federation.training, federation.strategy, 1, None, None),
        [Example([i % 250 + 3 for i in range(LENGTH)], LENGTH // 2)] * (2 * ROWS),
        lambda some: collate(some, 0),
        causal_loss_sum,
        federation.training,
        server_round=1,
        rounds=1,
        max_batch_size=None,
        ranks=Ranks([torch.device("cpu")]),
        autocast=None,
        seed="x",
    )
    assert result.steps == federation.training.local_steps
    measured = resident_peak() - before
    return {
        "weights, MB": peak.weights / 1e6,
        "loading, MB": loading / 1e6,
        "loading / weights": loading / peak.weights,
        "estimated, MB": peak.total / 1e6,
        "measured, MB": measured / 1e6,
        "estimated / measured": peak.total / measured,
    }


def _map_large_tensors() -> None:
    libc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        assert libc.mallopt(option, 65536) == 1


def _federation(path: str, strategy: str, base: Quantization) -> FederationConfig:
    training = {"learning_rate": 1e-4, "local_steps": 2, "batch_size": ROWS, "max_length": LENGTH, "packing": "off"}
    settings = {"path": path, "dtype": "float32", "quantization": base}
    return FederationConfig.model_validate(
        {"name": "peaks", "model": settings, "strategy": STRATEGIES[strategy], "rounds": 1, "training": training}
    )
