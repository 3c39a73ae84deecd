"""Masked sums are refused with all that needs single updates, each with its reason."""

import json
from typing import Any

import pytest

from common.config.federation import FederationConfig, resolved, settings_for_sites
from common.config.load import parse
from common.config.strategy import names
from common.errors import ConfigError
from strategies import STRATEGIES
from tests.harness.manifests import ROOT

SUMMED = ["fedftg", "ffa-lora", "fedsvd", "rolora", "fedit", "fedsa-lora"]
STRATEGY: dict[str, Any] = {"fedftg": {"name": "fedftg", "subspace": "shared"}}

SGD = {"learning_rate": 0.1, "local_steps": 1, "optimizer": "sgd", "max_grad_norm": None}


def federation(**changes: Any) -> FederationConfig:
    data: dict[str, Any] = {
        "name": "x",
        "model": {"path": "m"},
        "strategy": "fedit",
        "rounds": 1,
        "cohort": {"min_clients": 3},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "secure_aggregation": {"threshold": 2},
    }
    return parse({**data, **changes}, FederationConfig, "f.yaml")


@pytest.mark.parametrize("name", SUMMED)
def test_one_line_is_enough_where_a_sum_is(name: str) -> None:
    config = federation(strategy=STRATEGY.get(name, name))
    assert config.admission.norm_ratio is None
    assert federation(strategy=STRATEGY.get(name, name), secure_aggregation=None).admission.norm_ratio == 10.0
    assert resolved(config, ROOT / "f.yaml").secure_aggregation == config.secure_aggregation


def test_every_other_strategy_says_why() -> None:
    reasons = {
        "flexlora": "averages the products B A of every site",
        "fedex-lora": "adds the products B A of every site to the base weights",
        "flora": "stacks the factors of every site",
    }
    assert sorted([*reasons, *SUMMED]) == sorted(names()) == sorted(STRATEGIES)
    for name, reason in reasons.items():
        with pytest.raises(ConfigError, match=f"`secure_aggregation` shows .* `strategy` {name} {reason}"):
            federation(strategy=name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "fedftg"}, "`subspace` own has other bases .* allowed with it: `subspace` shared"),
        ({"strategy": {**STRATEGY["fedftg"], "wire_precision": "int8"}}, "rounds every update; allowed .* float32"),
        ({"strategy": {**STRATEGY["fedftg"], "optimizer_state": "averaged"}}, "second moments, which have no bound"),
        ({"strategy": {"name": "fedftg", "projection": "none"}}, "`projection` none sends whole weights; allowed"),
        ({"aggregation": {"method": "mean", "weights": "uniform"}}, "weights a site by its rows; allowed with it: "),
        ({"aggregation": "median"}, "no single update, which `aggregation` median needs; allowed with it: mean"),
        ({"aggregation": {"method": "mean", "clip_norm": 2.0}}, "`aggregation` mean with `clip_norm` needs"),
        ({"aggregation": {"method": "krum", "byzantine": 0}}, "`aggregation` krum needs"),
        ({"admission": {"norm_ratio": 5.0}}, "whose norm `admission.norm_ratio` 5 could be compared with"),
        ({"training": SGD}, "sgd without `max_grad_norm` has none"),
        ({"cohort": {"min_clients": 4}}, "`cohort.min_clients` 4; allowed: .* 3 to 4"),
        ({"secure_aggregation": {"threshold": 4}}, "`cohort.min_clients` 3; allowed: .* 2 to 3"),
        ({"secure_aggregation": {"threshold": 1}}, "threshold"),
        ({"local": {"sites": ["a.yaml"], "warm": False}}, "in a site's worker, and `local.warm` false"),
    ],
)
def test_what_needs_single_updates_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        federation(**changes)


def test_sites_agree_to_the_threshold_and_old_agreements_stay_good() -> None:
    told = json.loads(settings_for_sites(federation(secure_aggregation={"threshold": 3, "tries": 7})))
    assert told["secure_aggregation"] == {"threshold": 3, "noise": 0.0}
    assert parse(told, FederationConfig, "message").secure_aggregation is not None
    assert "secure_aggregation" not in json.loads(settings_for_sites(federation(secure_aggregation=None)))
