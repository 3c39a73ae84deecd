"""Exact match as an ``evaluate`` module that needs no hub."""

import unicodedata
from typing import Any

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of predictions equal to their reference; 0 to 1.

    Compared without regard to case, Unicode form (NFKC), white space and a final full stop. Other signs count: in
    clinical text HER2+ is not HER2-, and 2.5 mg is not 2 5 mg.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="exact match after normalisation",
            citation="",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        same = [_normal(p) == _normal(r) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(same) / len(same)}


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()
