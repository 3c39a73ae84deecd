"""Corpus BLEU-4 as an ``evaluate`` module that needs no hub, over the ``sacrebleu`` package."""

from typing import Any

import datasets
import evaluate
import sacrebleu


class Bleu4(evaluate.Metric):
    """Corpus BLEU with 1- to 4-grams, sacrebleu's defaults, divided by 100; 0 to 1 (Papineni et al., 2002).

    0 when no prediction has four words: there is no 4-gram to count.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="corpus BLEU-4",
            citation="Papineni et al., BLEU, 2002; Post, A call for clarity in reporting BLEU scores, 2018",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"bleu_4": sacrebleu.corpus_bleu(predictions, [references], force=True).score / 100.0}
