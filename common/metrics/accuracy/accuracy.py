"""Accuracy as an ``evaluate`` module that needs no hub, over scikit-learn."""

from typing import Any

import datasets
import evaluate
from sklearn import metrics


class Accuracy(evaluate.Metric):
    """Share of predicted labels that are right; 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="accuracy",
            citation="",
            inputs_description="predictions and references: lists of label numbers",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        return {"accuracy": metrics.accuracy_score(references, predictions)}
