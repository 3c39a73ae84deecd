"""The experiments that are published load, in both scales, whether or not their data is there."""

from pathlib import Path

import pytest

import benchmarks
from server.experiment_config import load_experiment

FILES = sorted((Path(benchmarks.__file__).parent / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("scale", [None, "quick"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_experiment_loads_and_compares_fedftg_with_lora(file: Path, scale: str | None) -> None:
    names = {choice.called for choice in load_experiment(file, scale).grid.strategies}
    assert {"fedftg", "flexlora", "ffa-lora", "rolora"} <= names
