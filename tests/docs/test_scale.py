"""docs/scale.md says what the model of ``benchmarks.scale.model`` computes from the recorded measurements."""

from pathlib import Path

import pytest

from benchmarks.scale import model

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_page_holds_the_computed_tables_and_constants() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in (model.run(), model.levers()):
        assert model.text(table) in page, f"write this into {PAGE.name}:\n{model.text(table)}"
    for name, value in model.facts().items():
        assert f"| {name} | {value} |" in page, f"| {name} | {value} |"


def test_cost_of_measured_runs_is_what_was_measured() -> None:
    """The two runs that differ in sites, as CPU seconds of a round: the constants are differences of whole runs."""
    known, rows = model.constants(), {(r["strategy"], r["sites"]): r for r in model._rows("scale") if r["TLS"] == "no"}
    few, many = rows["fedftg", 16], rows["fedftg", 256]
    for part in ("SuperLink", "ServerApp"):
        costs = [
            model.cost(
                model.Way(1e6 * r["up MB"] / r["sites"], 1e6 * r["down MB"] / r["sites"], 0.0), r["sites"], known
            )
            for r in (few, many)
        ]
        measured = (many[f"{part} CPU s"] - few[f"{part} CPU s"]) / 3
        assert costs[1][part][0] - costs[0][part][0] == pytest.approx(measured, rel=0.01)
        assert costs[1][part][1] == pytest.approx(costs[1][part][0], rel=0.01)  # the bytes are those that were measured


def test_bytes_of_lora_are_those_of_its_factors() -> None:
    """Llama-3-8B at rank 16 on all linear layers has 41.9 million weights in A and B."""
    assert model.ways(1000)["FedIT (LoRA), rank 16"].up == pytest.approx(4 * 41.9e6, rel=0.002)
