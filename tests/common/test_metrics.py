"""Scores are those of their definitions, offline, and from many processes at once."""

import subprocess
import sys

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from common.metrics import score
from tests.processes.launcher import environment

PREDICTIONS = ["acute pain of the left hand", "Unspecified fracture", "nothing"]
REFERENCES = ["acute pain of left hand", "unspecified  fracture.", "chronic ulcer of the foot"]


def test_scores_equal_the_packages_that_define_them() -> None:
    found = score(PREDICTIONS, REFERENCES)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert found["rouge_l"] == pytest.approx(sum(rouge) / 3)
    assert found["bleu_4"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score / 100)
    assert found["exact_match"] == pytest.approx(1 / 3)


def test_rouge_l_of_a_known_case() -> None:
    # longest common sequence "acute pain of left hand": 5 of 6 words predicted, 5 of 5 expected
    assert score(PREDICTIONS[:1], REFERENCES[:1])["rouge_l"] == pytest.approx(2 * (5 / 6) / (5 / 6 + 1))


def test_words_with_accents_count_as_words() -> None:
    assert score(["Ménière"], ["Menier"])["rouge_l"] == 0.0
    assert score(["maladie de Ménière"], ["Ménière"])["rouge_l"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b", "same"), [("HER2+", "HER2-", 0.0), ("2.5 mg", "2 5 mg", 0.0), ("Foot  pain.", "foot pain", 1.0)]
)
def test_exact_match_ignores_only_case_space_and_the_final_stop(a: str, b: str, same: float) -> None:
    assert score([a], [b])["exact_match"] == same


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["a"], ["a", "b"])


def test_processes_that_start_together_do_not_meet_in_a_cache() -> None:
    code = "from common.metrics import score; print(score(['a b c d'], ['a b c d'])['bleu_4'])"
    env = environment() | {"HF_HUB_OFFLINE": "1", "HOME": "/nonexistent", "HF_HOME": "/nonexistent/hf"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert [float(answer) for answer in answers] == pytest.approx([1.0, 1.0])
