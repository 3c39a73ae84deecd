"""Confusion matrix as an ``evaluate`` module that needs no hub, over scikit-learn."""

from typing import Any

import datasets
import evaluate
from sklearn import metrics


class Confusion(evaluate.Metric):
    """How many rows of label i were taken for label j, of labels 0 to ``labels`` - 1."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="confusion matrix",
            citation="",
            inputs_description="predictions and references: lists of label numbers; labels: how many there are",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int], labels: int) -> dict[str, Any]:
        return {"confusion": metrics.confusion_matrix(references, predictions, labels=range(labels)).tolist()}
