"""docs/scale.md says what the model of ``benchmarks.scale.model`` computes from the recorded measurements."""

import pytest

from benchmarks.scale import model


def test_page_holds_the_computed_tables_and_constants() -> None:
    page = model.PAGE.read_text(encoding="utf-8")
    for table in model.tables():
        assert table in page, "python -m benchmarks.scale.model writes it"


def test_cost_of_measured_runs_is_what_was_measured() -> None:
    """Two runs that differ in sites, and two that differ in bytes: CPU seconds of a round, without a run's start."""
    known, rows = model.constants(), {(r["strategy"], r["sites"]): r for r in model._rows("scale") if r["TLS"] == "no"}
    few, many, large = rows["fedftg", 16], rows["fedftg", 256], rows["fedftg-64", 16]
    for part in ("SuperLink", "ServerApp"):
        costs = []
        for r in (few, many, large):
            way = model.Way(1e6 * r["up MB"] / r["sites"], 1e6 * r["down MB"] / r["sites"], 0.0)
            once = known.app_byte * way.down if part == "ServerApp" else 0.0  # in the measured runs a part of the bytes
            costs.append(model.cost(way, r["sites"], known)[part] - once)
        for cost, row in zip(costs[1:], (many, large), strict=True):
            measured = (row[f"{part} CPU s"] - few[f"{part} CPU s"]) / 3
            assert cost - costs[0] == pytest.approx(measured, rel=0.01)


def test_bytes_of_lora_are_those_of_its_factors() -> None:
    """Llama-3-8B at rank 16 on all linear layers has 41.9 million weights in A and B."""
    assert model.ways(1000)["FedIT (LoRA), rank 16"].up == pytest.approx(4 * 41.9e6, rel=0.002)
