"""The preflight on noise against signal: counted by hand, and held against the noise that is added."""

import math

import pytest
import torch

from client.preflight.trust_and_ledger import affordable
from client.privacy.noise import norm_of, private
from common.accountant import cost, epsilon
from common.config.federation import FederationConfig
from common.config.load import parse
from common.config.site import PrivacyConfig
from tests.client.preflight.test_check import Files, files as files, look, output as output

PRIVACY = {"clip": 0.5, "noise_multiplier": 2.7, "delta": 1e-5, "max_epsilon": 8.0}


def test_noise_of_an_update_and_of_the_mean_are_those_that_are_added(files: Files) -> None:
    strategy = {"name": "ffa-lora", "rank": 1, "modules": ["down_proj"], "blocks": "0"}
    files.change("federation", strategy=strategy, rounds=5, cohort={"min_clients": 4})
    files.change("site", privacy=PRIVACY)
    finding = look("noise", files.subject())
    assert "32 numbers a round; signal at most 0.5, noise 7.64, in the mean of 4 sites 3.82" in finding.found  # B alone
    assert (finding.level, "too little" in finding.found) == ("ok", False)
    drawn = [norm_of(private({"b": torch.zeros(32)}, PrivacyConfig(**PRIVACY)).values()) for _ in range(400)]
    assert sum(drawn) / len(drawn) == pytest.approx(7.64, rel=0.05)


def test_noise_beside_a_shared_basis_counts_the_projected_numbers(files: Files) -> None:
    strategy = {"name": "fedftg", "rank": 2, "modules": ["down_proj"], "blocks": "0", "subspace": "shared"}
    files.change("federation", strategy=strategy)
    files.change("site", privacy=PRIVACY)
    assert look("noise", files.subject()).found.startswith("96 numbers a round")  # 2 of 48 columns, not 32 x 48


def test_few_sites_and_many_numbers_are_warned_with_how_many_sites_it_takes(files: Files) -> None:
    files.change("federation", strategy={"name": "fedit", "rank": 4}, rounds=5, cohort={"min_clients": 2})
    files.change("site", privacy=PRIVACY)
    few = look("noise", files.subject())
    assert (few.level, "too little to learn from" in few.found) == ("warning", True)
    sites = int(few.mend.partition(" sites")[0].replace(",", ""))
    files.change("federation", cohort={"min_clients": sites})
    assert look("noise", files.subject()).level == "ok"
    files.change("federation", cohort={"min_clients": sites // 2})
    assert look("noise", files.subject()).level == "warning"


def test_budget_that_ends_before_the_run_is_told(files: Files) -> None:
    files.change("federation", strategy={"name": "ffa-lora", "rank": 1, "blocks": "0"}, cohort={"min_clients": 2000})
    files.change("federation", rounds=9)
    files.change("site", privacy=PRIVACY)
    finding = look("noise", files.subject())
    assert (finding.level, "5 of 9 rounds within epsilon 8" in finding.found) == ("warning", True)
    files.change("site", privacy={"max_epsilon": 0.1})
    finding = look("noise", files.subject())
    assert (finding.level, "not one round" in finding.found) == ("FAIL", True)


def test_site_that_adds_no_noise_skips_the_check(files: Files) -> None:
    assert look("noise", files.subject()).level == "skipped"


@pytest.mark.parametrize("most", [1, 3, 40])
def test_affordable_rounds_are_the_last_that_the_budget_holds(most: int) -> None:
    config = PrivacyConfig(**PRIVACY)
    data = {"name": "f", "model": {"path": "m"}, "strategy": "fedit", "rounds": most}
    found = affordable(
        config, parse({**data, "training": {"learning_rate": 0.1, "local_steps": 1}}, FederationConfig, "f")
    )
    within = [t for t in range(most + 1) if epsilon(t * cost(2.7), 1e-5) <= 8.0]
    assert found == max(within)
    assert math.isfinite(epsilon(found * cost(2.7), 1e-5))
