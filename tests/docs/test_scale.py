"""docs/scale.md says what the model of ``benchmarks.scale.model`` computes from the recorded measurements."""

from typing import Any

import pytest

from benchmarks.scale import model


def test_page_holds_the_computed_tables_and_constants() -> None:
    page = model.PAGE.read_text(encoding="utf-8")
    for table in model.tables():
        assert table in page, "python -m benchmarks.scale.model writes it"


@pytest.mark.parametrize("part", ["SuperLink", "ServerApp"])
def test_costs_are_those_of_the_runs_that_they_are_fitted_to(part: str) -> None:
    """CPU seconds of whole runs, whose start is the same for all."""
    known = model.constants()
    over = [r[f"{part} CPU s"] - model.ROUNDS * of_measured(r, known)[part] for r in model.measured()]
    start = sum(over) / len(over)
    assert len(over) == 5
    assert all(
        abs(one - start) < max(1.5, 0.05 * r[f"{part} CPU s"]) for one, r in zip(over, model.measured(), strict=True)
    )


def test_costs_of_the_superlink_foretell_runs_that_had_no_part_in_the_fit() -> None:
    known = model.constants()
    others = {r["strategy"]: r for r in model._rows("scale") if r["TLS"] == "no" and r not in model.measured()}
    # The last evaluation of this one sends what waits at the server, which the bytes of a round leave out.
    others.pop("fedftg-down")
    assert len(others) == 9
    for row in others.values():
        told = model.ROUNDS * of_measured(row, known)["SuperLink"]
        assert told == pytest.approx(row["SuperLink CPU s"], rel=0.25), row["strategy"]


def of_measured(row: dict[str, Any], known: model.Constants) -> dict[str, float]:
    """The costs of a round of a measured run; what goes down has no part in the ServerApp's, as in the fit."""
    sites = row["sites"]
    way = model.Way(1e6 * row["up MB"] / sites, 1e6 * row["down MB"] / sites, 0.0)
    costs = model.cost(way, sites, known)
    return {**costs, "ServerApp": costs["ServerApp"] - known.app_byte * way.down}


def test_bytes_of_lora_are_those_of_its_factors() -> None:
    """Llama-3-8B at rank 16 on all linear layers has 41.9 million weights in A and B."""
    assert model.ways(1000)["FedIT (LoRA), rank 16"].up == pytest.approx(4 * 41.9e6, rel=0.002)
