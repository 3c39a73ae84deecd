"""``cohort.mode`` buffered: what it needs, and what does not go with it."""

import json
from typing import Any

import pytest

from common.config.federation import FederationConfig, settings_for_sites
from common.config.load import parse
from common.config.strategy import names
from common.errors import ConfigError

COHORT = {"mode": "buffered", "size": 3, "max_age": 4}


def federation(cohort: dict[str, Any] | None = None, **changes: Any) -> FederationConfig:
    data = {
        "name": "x",
        "model": {"path": "m"},
        "strategy": "ffa-lora",
        "rounds": 1,
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "cohort": COHORT | (cohort or {}),
        **changes,
    }
    return parse(data, FederationConfig, "f")


def test_sites_are_told_nothing_of_it() -> None:
    """So an agreement to the same federation stays good: a site's work is the same."""
    plain = federation({"mode": "rounds", "size": None, "max_age": None})
    assert settings_for_sites(federation()) == settings_for_sites(plain)
    assert json.loads(settings_for_sites(federation()))["cohort"] == {"min_clients": 2}


@pytest.mark.parametrize(
    ("cohort", "more", "reason"),
    [
        ({"size": None}, {}, "needs `cohort.size` and `cohort.max_age`"),
        ({"max_age": None}, {}, "needs `cohort.size` and `cohort.max_age`"),
        ({"size": 1}, {}, "`cohort.size` is 1, with `cohort.min_clients` 2; allowed: that many and more"),
        ({"mode": "rounds"}, {}, "`cohort.size` is 3, with `cohort.mode` rounds; allowed with it: buffered"),
        ({"mode": "rounds", "size": None}, {}, "`cohort.max_age` is 4, with `cohort.mode` rounds"),
        ({"fraction": 0.5}, {}, "`cohort.fraction` is 0.5; allowed with it: 1"),
        ({"deadline_factor": 3.0}, {}, "`cohort.deadline_factor` is 3; allowed with it: null"),
        ({}, {"secure_aggregation": {"threshold": 2}}, "`secure_aggregation` shows the sum of a round alone"),
        (
            {},
            {"strategy": {"name": "fedftg", "subspace": "shared", "optimizer_state": "averaged"}},
            "`optimizer_state` averaged has second moments, .* allowed with it: reset",
        ),
    ],
)
def test_contradictions_are_refused_by_name(cohort: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        federation(cohort, **more)


@pytest.mark.parametrize("name", names())
def test_a_strategy_takes_old_updates_or_says_why_not(name: str) -> None:
    reasons = {
        "rolora": "trains B and A in turn, and a change of one counts beside its own state of the other alone",
        "fedsvd": "draws A anew after every round, and a change of B counts beside its own A alone",
        "fedex-lora": "corrects the means of A and B, which takes sites that start from the same A and B",
    }
    if name not in reasons:
        assert federation(strategy=name).cohort.buffered
        return
    with pytest.raises(
        ConfigError, match=f"to a later state than they started from, and `strategy` {name} {reasons[name]}"
    ):
        federation(strategy=name)
