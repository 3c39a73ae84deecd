"""The experiments that are published load, in all of their scales, whether or not their data is there."""

from pathlib import Path

import pytest
import yaml

import benchmarks
from deploy.experiment.config import load_experiment

FILES = sorted((Path(benchmarks.__file__).parent / "experiments").glob("*.yaml"))
SCALES = [(file, scale) for file in FILES for scale in (None, *yaml.safe_load(file.read_text())["scales"])]


@pytest.mark.parametrize(("file", "scale"), SCALES, ids=[f"{file.stem}-{scale}" for file, scale in SCALES])
def test_published_experiment_loads_and_compares_fedftg_with_lora(file: Path, scale: str | None) -> None:
    names = {choice.called for choice in load_experiment(file, scale).grid.strategies}
    assert {"fedftg", "flexlora", "ffa-lora", "rolora"} <= names
