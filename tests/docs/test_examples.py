"""The examples in the docstrings of the library's classes give the results that they show."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "strategies.rule",
        "common.model.tuning",
        "common.protocol.factors",
        "common.protocol.versions",
        "client.training.galore",
    ],
)
def test_an_example_gives_what_it_shows(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0
