"""A federation with long-lived workers ends where one with a process for every message ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deploy.sandbox.tiny import make_federation
from tests.harness.launcher import launch, survivors

SIZES = {"site-a": 9, "site-b": 17}
ROUNDS = 2
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedftg, shared, bfloat16, moments averaged": {
        "name": "fedftg",
        "blocks": "lower half",
        "rank": 4,
        "subspace": "shared",
        "wire_precision": "bfloat16",
        "optimizer_state": "averaged",
    },
    "ffa-lora, moments kept": {"name": "ffa-lora", "blocks": "lower half", "rank": 2, "optimizer_state": "keep"},
}


def bytes_down(run: Path) -> dict[int, set[int]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["phase"] == "train"]
    return {n: {r["bytes"]["down"] for r in train if r["round"] == n} for n in range(1, ROUNDS + 1)}


def result(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("fedftg") else pytest.mark.long) for name in STRATEGIES]
)
def test_warm_is_cold(tmp_path: Path, name: str) -> None:
    file = make_federation(
        tmp_path, SIZES, strategy=STRATEGIES[name], rounds=ROUNDS, evaluation={"every": 9, "samples": 0}
    )
    config = yaml.safe_load(file.read_text())
    for warm in (True, False):
        file.write_text(yaml.safe_dump({**config, "local": {**config["local"], "warm": warm}}))
        done = launch(file, "--name", "warm" if warm else "cold")
        assert done.returncode == 0, done.stdout + done.stderr
    assert survivors(file) == []
    runs = tmp_path / "runs"
    warm_model, cold_model = result(runs / "warm"), result(runs / "cold")
    base = load_file(tmp_path / "model" / "model.safetensors")
    moved = 0.0
    for key, tensor in warm_model.items():
        change = tensor - base.get(key, 0.0)
        moved += float(change.norm())
        # Replies are folded in as they arrive, so the last bits depend on who is first.
        assert float((tensor - cold_model[key]).norm()) <= 1e-5 * float(change.norm())
    assert moved > 0
    events = (runs / "cold" / "events.jsonl").read_text() + (runs / "warm" / "events.jsonl").read_text()
    assert "client_failed" not in events
    down = bytes_down(runs / "warm")
    assert down == bytes_down(runs / "cold")
    if "fedftg" in name:
        assert down[1] == {0}  # the base model is there
        assert len(down[2]) == 1
    for site in SIZES:
        status = json.loads((runs / "warm" / "logs" / f"{site}-worker.json").read_text())
        assert status["messages"] == ROUNDS + 2  # the hello, the rounds, the last evaluation
        assert status["crashes"] == 0
