"""Scores of generated answers and of labels through ``evaluate``, with the metric modules in this folder and no hub."""

import atexit
import shutil
import tempfile
from functools import cache
from importlib import import_module
from typing import Any

ANSWERS = {"rouge_l": "RougeL", "bleu_4": "Bleu4", "exact_match": "ExactMatch"}
LABELS = {"accuracy": "Accuracy", "macro_f1": "MacroF1", "mcc": "Mcc"}
CLASSES = {**ANSWERS, **LABELS, "confusion": "Confusion"}
#: How the names of counts by label begin.
COUNTS = "confusion/"


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE-L, BLEU-4 and exact match, each from 0 to 1; see the modules for their definitions.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    return {name: float(_compute(name, predictions, references)) for name in ANSWERS}


def classified(predictions: list[int], references: list[int], labels: int) -> dict[str, float]:
    """Accuracy, macro F1, MCC, and ``confusion/i/j``: how many rows of label i were taken for label j.

    Args:
        predictions: numbers of labels.
        references: the right ones.
        labels: how many labels there are.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    scores = {name: float(_compute(name, predictions, references)) for name in LABELS}
    matrix = _compute("confusion", predictions, references, labels=labels)
    return scores | {f"{COUNTS}{i}/{j}": float(count) for i, line in enumerate(matrix) for j, count in enumerate(line)}


def _compute(name: str, predictions: list[Any], references: list[Any], **options: int) -> Any:  # noqa: ANN401
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give as many, at least one")
    return _metric(name).compute(predictions=predictions, references=references, **options)[name]


@cache
def _metric(name: str) -> Any:  # noqa: ANN401 - `evaluate` ships no types
    """One metric, from its class.

    ``evaluate.load`` takes the same modules by their folder, but first copies them into a cache in the home folder,
    where processes that start together meet and which a hospital's machine may not let us write. Predictions and
    references stay in memory: they are private rows.
    """
    module = import_module(f"common.metrics.{name}.{name}")
    return getattr(module, CLASSES[name])(cache_dir=_scratch(), keep_in_memory=True)


@cache
def _scratch() -> str:
    """The empty folder that every ``evaluate.Metric`` insists on; it lives as long as the process."""
    folder = tempfile.mkdtemp(prefix="fedspan-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
