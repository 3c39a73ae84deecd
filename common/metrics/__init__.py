"""Scores of generated answers through ``evaluate``, with the metric modules in this folder and no hub."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

METRICS = ("rouge_l", "bleu_4", "exact_match")


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE-L, BLEU-4 and exact match, each from 0 to 1; see the modules for their definitions.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give as many, at least one")
    scores: dict[str, float] = {}
    for name in METRICS:
        result = _metric(name).compute(predictions=predictions, references=references)
        scores[name] = float(result[name])
    return scores


@cache
def _metric(name: str) -> Any:  # noqa: ANN401 - `evaluate` ships no types
    """Load one module.

    ``evaluate`` copies a module into a cache before it imports it. The cache of this process alone keeps processes that
    start together from meeting there, and works where the home folder is read-only.
    """
    import evaluate

    return evaluate.load(
        str(Path(__file__).parent / name),
        module_type="metric",
        cache_dir=_scratch(),
        keep_in_memory=True,
        experiment_id=name,
    )


@cache
def _scratch() -> str:
    """A folder that lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="fedspan-metrics-")
    _KEPT.append(folder)
    return folder.name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
