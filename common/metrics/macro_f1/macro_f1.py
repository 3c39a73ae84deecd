"""Macro F1 as an ``evaluate`` module that needs no hub, over scikit-learn."""

from typing import Any

import datasets
import evaluate
from sklearn import metrics


class MacroF1(evaluate.Metric):
    """Unweighted mean of the labels' F1 scores; 0 to 1.

    Over the labels that occur, as predicted or as right; one that is never predicted, or never right, has an F1 of 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="macro-averaged F1",
            citation="",
            inputs_description="predictions and references: lists of label numbers",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        return {"macro_f1": metrics.f1_score(references, predictions, average="macro", zero_division=0.0)}
