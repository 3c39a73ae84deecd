"""Every strategy's curve on a tiny federation is the recorded one: losses to 0.01 %, bytes exactly.

``python -m tests.client.test_recorded_curves`` records them anew, when a change of the numbers is meant.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from common.config.strategy import names
from tests.client.test_methods_apps import LORA, of, run

RECORDED = Path(__file__).parent / "recorded" / "curves.json"
FEDFTG = {"blocks": "lower half", "rank": 4, "update_proj_gap": 2, "scale": 1.0}
AVERAGED = {"blocks": "lower half", "rank": 4, "scale": 1.0, "subspace": "shared", "optimizer_state": "averaged"}
STRATEGIES = {name: {"name": name, **(FEDFTG if name == "fedftg" else LORA)} for name in names()}
STRATEGIES["fedftg, moments averaged"] = {"name": "fedftg", **AVERAGED}


def curve(folder: Path, strategy: str) -> dict[str, list[float]]:
    """Held-out loss before the first and after every round, and bytes up; means of both sites."""
    changes: dict[str, Any] = {"evaluation": {"server": None}} if strategy == "fedsa-lora" else {}
    rounds = 3
    _, records, _ = run(folder, strategy=STRATEGIES[strategy], rounds=rounds, **changes)
    losses, trained = of(records, "evaluate"), of(records, "train")
    sites = ("site-a", "site-b")
    return {
        "loss": [sum(losses[s, n]["evaluate"]["loss"] for s in sites) / 2 for n in range(rounds + 1)],
        "up": [sum(trained[s, n]["bytes"]["up"] for s in sites) / 2 for n in range(1, rounds + 1)],
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_curve_is_the_recorded_one(tmp_path: Path, strategy: str) -> None:
    recorded = json.loads(RECORDED.read_text())[strategy]
    found = curve(tmp_path, strategy)
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-4)
    assert found["up"] == recorded["up"]


def test_every_strategy_learns_and_no_two_do_the_same() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == STRATEGIES.keys()
    assert all(curves["loss"][-1] < curves["loss"][0] for curves in recorded.values())
    assert len({tuple(curves["loss"]) for curves in recorded.values()}) == len(STRATEGIES)


def main() -> None:
    """Record all curves."""
    made = {}
    for strategy in STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            made[strategy] = curve(Path(folder), strategy)
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
