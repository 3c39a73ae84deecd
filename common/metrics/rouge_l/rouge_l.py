"""ROUGE-L as an ``evaluate`` module that needs no hub, over the ``rouge-score`` package."""

from typing import Any

import datasets
import evaluate
from rouge_score import rouge_scorer


class RougeL(evaluate.Metric):
    """Mean ROUGE-L F-measure of prediction against reference, with Porter stemming; 0 to 1 (Lin, 2004)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-L F-measure",
            citation="Lin, ROUGE: a package for automatic evaluation of summaries, 2004",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
        return {"rouge_l": sum(scores) / len(scores)}
