"""ROUGE-L as an ``evaluate`` module that needs no hub, over the ``rouge-score`` package."""

import re
from typing import Any

import datasets
import evaluate
from nltk.stem import porter
from rouge_score import rouge_scorer


class Words:
    """Lower-case words, those of more than three letters stemmed (Porter).

    For ASCII these are rouge-score's own tokens; that tokenizer breaks words at every other letter, so it is of no use
    for languages with accents.
    """

    def __init__(self) -> None:
        self._stem = porter.PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Called by rouge-score."""
        words = re.findall(r"[^\W_]+", text.lower())
        return [self._stem(word) if len(word) > 3 else word for word in words]


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
        scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
        scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
        return {"rouge_l": sum(scores) / len(scores)}
