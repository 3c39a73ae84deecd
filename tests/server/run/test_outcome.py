"""The numbers of a run for the model card."""

import math
import statistics
from pathlib import Path

import pytest
from scipy.stats import norm

from server.run.outcome import outcome_of
from tests.harness import sample_run

PRIVATE = {"clip": 0.5, "noise": 2.0, "delta": 1e-5, "max_epsilon": 9.0}


def test_scores_are_means_over_the_sites_with_deviations(tmp_path: Path) -> None:
    found = outcome_of(sample_run.completed(tmp_path / "run"), sample_run.ROUNDS)
    told = {site: [sample_run.scores(site, version)["loss"] for version in (0, 4)] for site in sample_run.SITES}
    loss = found.scores["loss"]
    assert (found.round, found.sites, found.chosen, found.by, loss.sites) == (4, 3, "last", None, 3)
    assert loss.before == pytest.approx(sum(before for before, _ in told.values()) / 3)
    assert loss.mean == pytest.approx(sum(after for _, after in told.values()) / 3)
    assert loss.deviation == pytest.approx(statistics.stdev(after for _, after in told.values()))
    assert found.privacy is None


def test_best_round_has_its_own_scores(tmp_path: Path) -> None:
    found = outcome_of(sample_run.completed(tmp_path / "run"), 1, by="loss")
    assert (found.round, found.chosen, found.by) == (1, "best", "loss")
    told = [sample_run.scores(site, 1)["loss"] for site in sample_run.SITES]
    assert found.scores["loss"].mean == pytest.approx(sum(told) / 3)


def test_scores_that_are_not_told_or_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = sample_run.begin(tmp_path / "run")
    sample_run.train(folder, 1, "site-a")
    for site, loss in {"site-a": 1.0, "site-b": math.inf}.items():
        folder.metrics({"round": 1, "client": site, "phase": "evaluate", "evaluate": {"loss": loss}})
    found = outcome_of(folder.path, 1)
    assert found.scores.keys() == {"loss"}
    assert found.scores["loss"].model_dump() == {"mean": 1.0, "deviation": None, "sites": 1, "before": None}
    assert found.sites == 1


def test_privacy_counts_every_update_that_came(tmp_path: Path) -> None:
    folder = sample_run.begin(tmp_path / "run")
    for site, privacy in {"site-a": PRIVATE, "site-b": {**PRIVATE, "noise": 4.0, "delta": 1e-6}}.items():
        joined = {"num_examples": 5, "held_out": 0, "device": "cpu", "version": "0", "privacy": privacy}
        folder.event("client_joined", client=f"{site}-private", **joined)
        for number in (1, 2):
            folder.event("reply", round=number, client=f"{site}-private", loss=1.0, seconds=1.0)
    folder.event("update_refused", round=3, client="site-a-private", reason="too long", kind="RefusedUpdate")
    spent = outcome_of(folder.path, 2).privacy
    assert spent is not None
    assert spent.epsilon is not None
    assert (spent.sites, spent.delta) == (2, 1e-5)
    # site-a's three updates: mu^2 = 3 (2 / z)^2, z = 4; the epsilon at which a mu-GDP mechanism has this delta
    mu = math.sqrt(3 * (2 / 4) ** 2)
    at = norm.cdf(-spent.epsilon / mu + mu / 2) - math.exp(spent.epsilon) * norm.cdf(-spent.epsilon / mu - mu / 2)
    assert at == pytest.approx(1e-5, rel=1e-3)


def test_site_that_once_sent_without_noise_is_not_called_private(tmp_path: Path) -> None:
    folder = sample_run.begin(tmp_path / "run")  # all join without
    joined = {"num_examples": 5, "held_out": 0, "device": "cpu", "version": "0", "privacy": PRIVATE}
    folder.event("client_joined", client="site-a", **joined)
    sample_run.train(folder, 1, "site-a")
    assert outcome_of(folder.path, 1).privacy is None
