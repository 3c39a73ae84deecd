"""Exact match as an ``evaluate`` module that needs no hub."""

import re
from typing import Any

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of predictions equal to their reference after lower-casing and folding punctuation and white space."""

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
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
