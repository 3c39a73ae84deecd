"""A site whose session is new for every message ends where one with a long-lived worker ends.

All that it holds has come with the message, from the base model, or from what it keeps in its Flower context.
"""

from pathlib import Path
from typing import Any

import pytest

from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import records, same_bits

SIZES = {"site-a": 9, "site-b": 17}
LORA = {"blocks": "lower half", "rank": 2, "lora_alpha": 4.0}


@pytest.mark.parametrize(
    "strategy",
    [
        {"rank": 2, "downlink_rank": 3},
        {"name": "fedftg", "rank": 2, "subspace": "shared", "optimizer_state": "averaged"},
        {"name": "ffa-lora", **LORA, "optimizer_state": "keep"},
        {"name": "rolora", **LORA, "lora_dropout": 0.1},
        {"name": "fedsa-lora", **LORA},
        {"name": "fedex-lora", **LORA},
        {"name": "flora", **LORA},
    ],
    ids=str,
)
def test_cold_is_warm(tmp_path: Path, strategy: dict[str, Any]) -> None:
    server = {"server": None} if strategy.get("name") == "fedsa-lora" else {}
    file = make_federation(tmp_path, SIZES, strategy=strategy, rounds=3, evaluation=server)
    warm, cold = in_one_process(file, "warm"), in_one_process(file, "cold", cold=True)
    same_bits(warm, cold)
    up = [[r["bytes"]["up"] for r in records(run, "train")] for run in (warm, cold)]
    assert up[0] == up[1]
