"""Reads what a run has left in its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

Record = dict[str, Any]


def lines(file: Path) -> list[Record]:
    """The complete records of a .jsonl file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def events(run: Path, kind: str) -> list[Record]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def records(run: Path, phase: str) -> list[Record]:
    """What was measured in a phase."""
    return [record for record in lines(run / "metrics.jsonl") if record["phase"] == phase]


def trainings(run: Path) -> list[tuple[int, str]]:
    """Which updates made the result, by round and site."""
    return sorted((record["round"], record["client"]) for record in records(run, "train"))


def outcome(run: Path) -> Record:
    return dict(json.loads((run / "run.json").read_text()))


def payload(shapes: Mapping[str, Sequence[int]], **dtypes: torch.dtype) -> int:
    """Bytes of small tensors in a message, those of a safetensors file of them; float32 but for ``dtypes``."""
    return len(save({name: torch.zeros(shape, dtype=dtypes.get(name)) for name, shape in shapes.items()}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model in a folder: of a run, its result."""
    return {key: t for p in sorted((folder / "model").glob("*.safetensors")) for key, t in load_file(p).items()}


def same_result(one: Path, other: Path, base: Path, tolerance: float = 1e-5) -> None:
    """The changes that two runs made to the model in the folder ``base`` differ by rounding only."""
    start, a, b = weights(base), weights(one), weights(other)
    assert a.keys() == b.keys()
    assert a
    for key, tensor in a.items():
        moved = float((tensor - start.get(key, torch.zeros(()))).norm())
        assert float((tensor - b[key]).norm()) <= tolerance * max(moved, 1e-12), key


def same_bits(one: Path, other: Path) -> None:
    """Two runs have made the same model, and have measured the same: all but times and bytes."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert a
    assert [key for key, tensor in a.items() if not torch.equal(tensor, b[key])] == []
    assert _numbers(one) == _numbers(other)


def _numbers(run: Path) -> dict[tuple[int, str, str], Record]:
    told = {}
    for record in lines(run / "metrics.jsonl"):
        kept = {k: v for k, v in record.items() if k == "evaluate"}
        kept |= {k: v for k, v in record.get("train", {}).items() if k in ("loss", "steps", "tokens", "num_examples")}
        told[record["round"], record["client"], record["phase"]] = kept
    return told
