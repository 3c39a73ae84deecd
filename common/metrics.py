"""Scores: one table of all scores, how each is computed (by ``evaluate``), and where each is shown."""

import re
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

#: Kinds of predictions.
ANSWERS, LABELS = "answers", "labels"
#: Prefix of the names of confusion counts.
COUNTS = "confusion/"


@dataclass(frozen=True)
class Score:
    """One score of a model on held-out rows. Every task, page and display reads the table ``SCORES``.

    Attributes:
        name: the score's key in metrics and files.
        title: the score's name for people.
        meaning: explanation of the score, with its range.
        of: kind of the predictions that it judges (a task's ``predicts``); None: every task computes it with the loss.
        compute: computes the score from predictions and as many references; None when ``of`` is None.
        lower_is_better: whether smaller values are better.
        headline: whether headline, progress line and status show the score.
        curve: whether the report draws it round by round.
        selectable: whether an experiment may select learning rates by it.
        bounded: whether the score lies between ``least`` and 1; otherwise it has no upper limit.
        least: the smallest possible value.
    """

    name: str
    title: str
    meaning: str
    of: str | None = None
    compute: Callable[[list[Any], list[Any]], float] | None = None
    lower_is_better: bool = False
    headline: bool = False
    curve: bool = False
    selectable: bool = True
    bounded: bool = True
    least: float = 0.0

    @property
    def in_text(self) -> str:
        """The title inside a sentence: "macro F1", but "ROUGE-L"."""
        return self.title if self.title[1:2].isupper() else self.title[:1].lower() + self.title[1:]


def rouge_l(predictions: list[str], references: list[str]) -> float:
    """Mean ROUGE-L F-measure of prediction against reference, with Porter stemming; 0 to 1 (Lin, 2004)."""
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
    """Corpus BLEU with 1- to 4-grams, sacrebleu's defaults, divided by 100; 0 to 1 (Papineni et al., 2002).

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
    """Matthews correlation coefficient of any number of labels; -1 to 1 (Gorodkin, 2004).

    0 when only one label is right, or only one is predicted.
    """
    from sklearn import metrics

    if len({*references}) == 1 or len({*predictions}) == 1:  # scikit-learn says so too, but with a warning
        return 0.0
    return float(metrics.matthews_corrcoef(references, predictions))


_IN_ORDER = (
    Score("loss", "Loss", "mean cross-entropy of the expected answer, in nats per token",
          lower_is_better=True, headline=True, curve=True, bounded=False),
    Score("perplexity", "Perplexity", "e to the power of the loss; 1 is certainty",
          lower_is_better=True, selectable=False, bounded=False),
    Score("accuracy", "Accuracy", "share of rows whose label is right", LABELS, accuracy, headline=True, curve=True),
    Score("macro_f1", "Macro F1", "unweighted mean of the labels' F1 scores, 0 to 1", LABELS, macro_f1),
    Score("mcc", "MCC", "Matthews correlation of chosen and right label, -1 to 1; 0 is chance", LABELS, mcc,
          least=-1.0),
    Score("rouge_l", "ROUGE-L", "longest common word sequence of generated and expected answer, 0 to 1",
          ANSWERS, rouge_l, headline=True, curve=True),
    Score("bleu_4", "BLEU-4", "shared runs of one to four words, 0 to 1", ANSWERS, bleu_4, curve=True),
    Score("exact_match", "Exact match", "share of generated answers equal to the expected one", ANSWERS, exact_match),
)  # fmt: skip
SCORES = {score.name: score for score in _IN_ORDER}


def scores(of: str, predictions: list[Any], references: list[Any]) -> dict[str, float]:
    """The scores for one kind of prediction, by name. Thread-safe.

    Args:
        of: the kind, as in ``Score``.
        predictions: texts, or numbers of labels.
        references: the right texts or numbers.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give as many, at least one")
    # A metric object of `evaluate` holds the rows that it computes on, so calls do not share objects. An object needs a
    # folder. The default folder is in the home folder, where concurrent processes collide and which may be read-only,
    # so each object gets a temporary one. Rows are private: they stay in memory and are never written to that folder.
    with _COMPUTING, tempfile.TemporaryDirectory(prefix="fedspan-metrics-") as folder:
        chosen = [score for score in SCORES.values() if score.of == of]
        metrics = {score.name: _metric()(score.compute, type(references[0]), folder) for score in chosen}
        found = {name: m.compute(predictions=predictions, references=references) for name, m in metrics.items()}
    return {name: float(result["score"]) for name, result in found.items()}


def confusion(predictions: list[int], references: list[int], labels: int) -> dict[str, float]:
    """``confusion/i/j``: number of rows with right label i and predicted label j, both below ``labels``."""
    pairs = Counter(zip(references, predictions, strict=True))
    return {f"{COUNTS}{i}/{j}": float(pairs[i, j]) for i in range(labels) for j in range(labels)}


#: ``evaluate`` seeds numpy's global generator while it computes: two threads at once would not both restore it.
_COMPUTING = threading.Lock()
_TYPES: dict[type, str] = {str: "string", int: "int64", float: "float64"}


@cache
def _metric() -> Any:  # noqa: ANN401 - `evaluate` ships no types
    """A score as a metric of ``evaluate``, which is imported when the first score is computed: that takes seconds."""
    import datasets
    import evaluate

    class Metric(evaluate.Metric):  # type: ignore[misc]
        def __init__(self, score: Callable[[list[Any], list[Any]], float], of: type, folder: str) -> None:
            self._score, self._value = score, datasets.Value(_TYPES[of])
            super().__init__(cache_dir=folder, keep_in_memory=True)

        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features({"predictions": self._value, "references": self._value})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
            return {"score": self._score(predictions, references)}

    return Metric
