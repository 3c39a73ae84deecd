"""Scores of generated answers and of labels: each is a function and a line in ``SCORES``, and ``evaluate`` runs it."""

import re
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

#: How the names of counts by label begin.
COUNTS = "confusion/"


@dataclass(frozen=True)
class Score:
    """One score of predictions against their references.

    Attributes:
        name: its key in metrics and files.
        title: its name for people.
        of: what is predicted, generated texts or numbers of labels.
        compute: the score of a list of predictions against as many references.
        citation: where it is defined.
    """

    name: str
    title: str
    of: Literal["answers", "labels"]
    compute: Callable[[list[Any], list[Any]], float]
    citation: str = ""


def rouge_l(predictions: list[str], references: list[str]) -> float:
    """Mean ROUGE-L F-measure of prediction against reference, with Porter stemming; 0 to 1."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    return float(sum(scores) / len(scores))


class Words:
    """Lower-case words, those of more than three letters stemmed (Porter).

    For ASCII these are rouge-score's own tokens; that tokenizer breaks words at every other letter, so it is of no use
    for languages with accents.
    """

    def __init__(self) -> None:
        from nltk.stem import porter

        self._stem = porter.PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Called by rouge-score."""
        words = re.findall(r"[^\W_]+", text.lower())
        return [self._stem(word) if len(word) > 3 else word for word in words]


def bleu_4(predictions: list[str], references: list[str]) -> float:
    """Corpus BLEU with 1- to 4-grams, sacrebleu's defaults, divided by 100; 0 to 1.

    0 when no prediction has four words: there is no 4-gram to count.
    """
    import sacrebleu

    return sacrebleu.corpus_bleu(predictions, [references], force=True).score / 100.0


def exact_match(predictions: list[str], references: list[str]) -> float:
    """Share of predictions equal to their reference; 0 to 1.

    Compared without regard to case, Unicode form (NFKC), white space and a final full stop. Other signs count: in
    clinical text HER2+ is not HER2-, and 2.5 mg is not 2 5 mg.
    """
    same = [_normal(p) == _normal(r) for p, r in zip(predictions, references, strict=True)]
    return sum(same) / len(same)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def accuracy(predictions: list[int], references: list[int]) -> float:
    """Share of predicted labels that are right; 0 to 1."""
    from sklearn import metrics

    return float(metrics.accuracy_score(references, predictions))


def macro_f1(predictions: list[int], references: list[int]) -> float:
    """Unweighted mean of the labels' F1 scores; 0 to 1.

    Over the labels that occur, as predicted or as right; one that is never predicted, or never right, has an F1 of 0.
    """
    from sklearn import metrics

    return float(metrics.f1_score(references, predictions, average="macro", zero_division=0.0))


def mcc(predictions: list[int], references: list[int]) -> float:
    """Matthews correlation coefficient of any number of labels; -1 to 1.

    0 when only one label is right, or only one is predicted.
    """
    from sklearn import metrics

    if len({*references}) == 1 or len({*predictions}) == 1:  # scikit-learn says so too, but with a warning
        return 0.0
    return float(metrics.matthews_corrcoef(references, predictions))


_BLEU = "Papineni et al., BLEU, 2002; Post, A call for clarity in reporting BLEU scores, 2018"
_MCC = "Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004"

SCORES = (
    Score(
        "rouge_l", "ROUGE-L", "answers", rouge_l, "Lin, ROUGE: a package for automatic evaluation of summaries, 2004"
    ),
    Score("bleu_4", "BLEU-4", "answers", bleu_4, _BLEU),
    Score("exact_match", "Exact match", "answers", exact_match),
    Score("accuracy", "Accuracy", "labels", accuracy),
    Score("macro_f1", "Macro F1", "labels", macro_f1),
    Score("mcc", "MCC", "labels", mcc, _MCC),
)


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """All scores of generated answers.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    return _computed("answers", predictions, references)


def classified(predictions: list[int], references: list[int], labels: int) -> dict[str, float]:
    """All scores of labels, and ``confusion/i/j``: how many rows of label i were taken for label j.

    Args:
        predictions: numbers of labels.
        references: the right ones.
        labels: how many labels there are.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    scores = _computed("labels", predictions, references)
    pairs = Counter(zip(references, predictions, strict=True))
    return scores | {f"{COUNTS}{i}/{j}": float(pairs[i, j]) for i in range(labels) for j in range(labels)}


#: ``evaluate`` seeds numpy's global generator while it computes: two threads at once would not both restore it.
_COMPUTING = threading.Lock()


def _computed(of: str, predictions: list[Any], references: list[Any]) -> dict[str, float]:
    """The scores of one kind of prediction, from any thread.

    A metric object of ``evaluate`` holds the rows that it computes on, so none is shared. It insists on an empty folder
    (by default in the home folder, where processes that start together meet, and which may not be ours to write). Rows
    are never written there: they are private, and stay in memory.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give as many, at least one")
    with _COMPUTING, tempfile.TemporaryDirectory(prefix="fedspan-metrics-") as folder:
        metrics = {score.name: _metric()(score, folder) for score in SCORES if score.of == of}
        return {
            name: float(metric.compute(predictions=predictions, references=references)[name])
            for name, metric in metrics.items()
        }


@cache
def _metric() -> Any:  # noqa: ANN401 - `evaluate` ships no types
    """The class of a score as a metric of ``evaluate``, imported when the first score is computed: it takes seconds."""
    import datasets
    import evaluate

    class Metric(evaluate.Metric):  # type: ignore[misc]
        def __init__(self, score: Score, folder: str) -> None:
            self._score = score
            super().__init__(cache_dir=folder, keep_in_memory=True)

        def _info(self) -> evaluate.MetricInfo:
            value = datasets.Value("string" if self._score.of == "answers" else "int32")
            return evaluate.MetricInfo(
                description=self._score.title,
                citation=self._score.citation,
                inputs_description=f"predictions and references: lists of {self._score.of}",
                features=datasets.Features({"predictions": value, "references": value}),
            )

        def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
            return {self._score.name: self._score.compute(predictions, references)}

    return Metric
