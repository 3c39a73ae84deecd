"""Matthews correlation coefficient as an ``evaluate`` module that needs no hub, over scikit-learn."""

from typing import Any

import datasets
import evaluate
from sklearn import metrics


class Mcc(evaluate.Metric):
    """Matthews correlation coefficient of any number of labels; -1 to 1 (Gorodkin, 2004).

    0 when only one label is right, or only one is predicted.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="Matthews correlation coefficient",
            citation="Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004",
            inputs_description="predictions and references: lists of label numbers",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        if len({*references}) == 1 or len({*predictions}) == 1:  # scikit-learn says so too, but with a warning
            return {"mcc": 0.0}
        return {"mcc": metrics.matthews_corrcoef(references, predictions)}
