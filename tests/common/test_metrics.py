"""Scores are those of their definitions, offline, and from many threads and processes at once."""

import itertools
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from common.metrics import COUNTS, SCORES, Score, confusion, scores
from tests.harness.processes import environment

PREDICTIONS = ["acute pain of the left hand", "Unspecified fracture", "nothing"]
REFERENCES = ["acute pain of left hand", "unspecified  fracture.", "chronic ulcer of the foot"]


def test_scores_equal_the_packages_that_define_them() -> None:
    found = scores("answers", PREDICTIONS, REFERENCES)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert found["rouge_l"] == pytest.approx(sum(rouge) / 3)
    assert found["bleu_4"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score / 100)
    assert found["exact_match"] == pytest.approx(1 / 3)


def test_rouge_l_of_a_known_case() -> None:
    # longest common sequence "acute pain of left hand": 5 of 6 words predicted, 5 of 5 expected
    assert scores("answers", PREDICTIONS[:1], REFERENCES[:1])["rouge_l"] == pytest.approx(2 * (5 / 6) / (5 / 6 + 1))


def test_words_with_accents_count_as_words() -> None:
    assert scores("answers", ["Ménière"], ["Menier"])["rouge_l"] == 0.0
    assert scores("answers", ["maladie de Ménière"], ["Ménière"])["rouge_l"] == pytest.approx(0.5)


def test_score_of_another_kind_of_prediction_needs_nothing_but_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absolute_error(predictions: list[float], references: list[float]) -> float:
        return sum(abs(p - r) for p, r in zip(predictions, references, strict=True)) / len(references)

    monkeypatch.setitem(SCORES, "mae", Score("mae", "MAE", "mean absolute error", "numbers", absolute_error))
    assert scores("numbers", [1.0, 2.5], [1.5, 2.5]) == {"mae": 0.25}
    assert "mae" not in scores("labels", [0], [1])


def test_title_inside_a_sentence() -> None:
    in_text = [SCORES[name].in_text for name in ("loss", "macro_f1", "mcc", "rouge_l", "exact_match")]
    assert in_text == ["loss", "macro F1", "MCC", "ROUGE-L", "exact match"]


@pytest.mark.parametrize(
    ("a", "b", "same"), [("HER2+", "HER2-", 0.0), ("2.5 mg", "2 5 mg", 0.0), ("Foot  pain.", "foot pain", 1.0)]
)
def test_exact_match_ignores_only_case_space_and_the_final_stop(a: str, b: str, same: float) -> None:
    assert scores("answers", [a], [b])["exact_match"] == same


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        scores("answers", ["a"], ["a", "b"])


@pytest.mark.long
def test_processes_that_start_together_do_not_meet_in_a_cache() -> None:
    code = "from common.metrics import scores; print(scores('answers', ['a b c d'], ['a b c d'])['bleu_4'])"
    env = environment() | {"HF_HUB_OFFLINE": "1", "HOME": "/nonexistent", "HF_HOME": "/nonexistent/hf"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [process.communicate(timeout=280)[0] for process in processes]
    assert [float(answer) for answer in answers] == pytest.approx([1.0, 1.0])


THREADS = 4


def _of_thread(turn: int) -> dict[str, float]:
    """Scores of answers and of labels that no other turn has."""
    words = [f"w{i}" for i in range(turn + 4)]
    answers = [" ".join(words[: turn % 5 + 1]), " ".join(words)]
    right = [i % 3 for i in range(10 + turn)]
    chosen = [(label + (i < turn)) % 3 for i, label in enumerate(right)]
    return scores("answers", answers, [" ".join(words)] * 2) | scores("labels", chosen, right)


def test_threads_that_score_at_once_get_their_own_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alone = [_of_thread(turn) for turn in range(24)]
    assert len({tuple(found.values()) for found in alone}) == len(alone)
    state = np.random.get_state(legacy=False)  # noqa: NPY002 - `evaluate` seeds the global generator while it computes
    together = threading.Barrier(THREADS)

    def a_share(first: int) -> list[dict[str, float]]:
        together.wait(timeout=60)
        return [_of_thread(turn) for turn in range(first, len(alone), THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        shares = list(pool.map(a_share, range(THREADS)))
    assert [shares[turn % THREADS][turn // THREADS] for turn in range(len(alone))] == alone
    np.testing.assert_equal(np.random.get_state(legacy=False), state)  # noqa: NPY002
    assert list(tmp_path.iterdir()) == []


CHOSEN = [0, 1, 1, 2, 0, 0, 1]
RIGHT = [0, 1, 2, 2, 0, 1, 1]


def test_scores_of_labels_equal_their_definitions() -> None:
    found = scores("labels", CHOSEN, RIGHT)
    pairs = list(zip(RIGHT, CHOSEN, strict=True))
    counts = {(i, j): pairs.count((i, j)) for i in range(4) for j in range(4)}
    assert confusion(CHOSEN, RIGHT, 4) == {f"{COUNTS}{i}/{j}": float(count) for (i, j), count in counts.items()}
    assert found["accuracy"] == pytest.approx(5 / 7)
    f1 = []
    for label in range(3):  # label 3 does not occur
        right = counts[label, label]
        f1.append(2 * right / (CHOSEN.count(label) + RIGHT.count(label)))
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3)
    # Gorodkin's R_K: the correlation of the two lists as one-hot vectors, all coordinates together
    one_hot = [np.eye(4)[labels] - np.eye(4)[labels].mean(0) for labels in (CHOSEN, RIGHT)]
    covariance = [float((a * b).sum()) for a, b in itertools.combinations_with_replacement(one_hot, 2)]
    assert found["mcc"] == pytest.approx(covariance[1] / (covariance[0] * covariance[2]) ** 0.5)


@pytest.mark.parametrize(
    ("chosen", "right", "f1"), [([0, 0], [0, 0], 1.0), ([1, 1], [0, 0], 0.0), ([0, 1], [0, 0], 1 / 3)]
)
def test_site_with_one_label_has_scores_too(chosen: list[int], right: list[int], f1: float) -> None:
    found = scores("labels", chosen, right)
    assert found["mcc"] == 0.0
    assert found["macro_f1"] == pytest.approx(f1)
