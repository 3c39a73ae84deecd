"""An option that could have no effect, and a number that nothing can take, are refused with key and what is allowed."""

from typing import Any

import pytest

from common.config.cohort import AdmissionConfig, CohortConfig, SecureAggregationConfig
from common.config.federation import FederationConfig
from common.config.load import parse
from common.config.outcome import BestConfig, DeliveryConfig
from common.config.section import Section
from common.config.site import SiteConfig
from common.config.strategy import FedFTGConfig
from common.config.training import TrainingConfig
from common.errors import ConfigError

LABELS = {"type": "sequence-classification", "labels": ["a", "b"]}
IMAGES = {"type": "image-classification", "labels": ["a", "b"]}
SGD = {"optimizer": "sgd"}


def federation(training: dict[str, Any] | None = None, **more: Any) -> FederationConfig:
    data = {"name": "x", "model": {"path": "m"}, "strategy": "fedftg", "rounds": 1}
    data["training"] = {"learning_rate": 0.1, "local_steps": 1} | (training or {})
    return parse(data | more, FederationConfig, "f.yaml")


def site(**more: Any) -> SiteConfig:
    data = {"name": "a", "data": {"path": "r.jsonl", "prompt": "q", "answer": "a"}}
    return parse(data | more, SiteConfig, "s.yaml")


def strategy(name: str = "fedftg", **options: Any) -> dict[str, Any]:
    return {"name": name, **options}


@pytest.mark.parametrize(
    ("training", "more", "says"),
    [
        (
            {"head_learning_rate": 0.2},
            {},
            "`training.head_learning_rate` is 0.2, but `task` causal-lm has no classification head",
        ),
        (
            {"head_learning_rate": 0.2},
            {"task": LABELS, "strategy": strategy(head="freeze")},
            "`strategy.head` freeze trains no head; allowed with it: train, local",
        ),
        (
            {"packing": "on"},
            {"task": IMAGES, "strategy": strategy(head="train")},
            "`training.packing` is on, but `task` image-classification packs no rows; allowed with it: auto, off",
        ),
        (
            SGD,
            {"strategy": strategy(moments="8bit")},
            "`strategy.moments` is 8bit, but `training.optimizer` sgd has no",
        ),
        (SGD, {"strategy": strategy("fedit", optimizer_state="keep")}, "is keep, but `training.optimizer` sgd has no"),
        (SGD, {"strategy": strategy(projection="none", optimizer_state="keep")}, "`strategy.optimizer_state` is keep"),
        (
            SGD,
            {"strategy": strategy(subspace="shared", optimizer_state="averaged")},
            "`strategy.optimizer_state` is averaged, but `training.optimizer` sgd has no moments; allowed with it: "
            "adamw",
        ),
    ],
)
def test_option_without_effect_is_refused(training: dict[str, Any], more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"^f.yaml: ") as caught:
        federation(training, **more)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("training", "more"),
    [
        ({"head_learning_rate": 0.2}, {"task": LABELS, "strategy": strategy(head="train")}),
        ({"head_learning_rate": 0.2}, {"task": LABELS, "strategy": strategy("fedit", head="local")}),
        ({"packing": "auto"}, {"task": IMAGES, "strategy": strategy(head="train")}),
        (SGD, {"strategy": strategy(optimizer_state="keep")}),  # the basis is kept
    ],
)
def test_the_same_option_is_taken_where_it_has_one(training: dict[str, Any], more: dict[str, Any]) -> None:
    federation(training, **more)


SECTIONS: dict[str, type[Section]] = {
    "training": TrainingConfig,
    "cohort": CohortConfig,
    "admission": AdmissionConfig,
    "secure_aggregation": SecureAggregationConfig,
    "best": BestConfig,
    "delivery": DeliveryConfig,
    "strategy": FedFTGConfig,
}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 10**400])
def test_no_number_is_endless(value: float) -> None:
    """Such a number would end a round, or an agreement's digest, with an error of Python's."""
    for name, section in SECTIONS.items():
        for key in [key for key, field in section.model_fields.items() if "float" in str(field.annotation)]:
            given = {"name": "fedftg", key: value} if name == "strategy" else {key: value}
            with pytest.raises(ConfigError, match=rf"f.yaml: .*`{name}\.{key}` is "):
                federation(**({name: given} if name != "training" else {"training": given}))


def test_numbers_beyond_what_takes_them_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`training.seed` is .*: input should be less than or equal to 1000000000000000000"
    ):
        federation({"seed": 2**64})
    with pytest.raises(ConfigError, match=r"`device_deadline` is .*: input should be less than or equal to 604800"):
        site(device_deadline=1e9)
    with pytest.raises(ConfigError, match=r"`devices` is 1000: input should be 'auto' or less than or equal to 256"):
        site(devices=1000)


@pytest.mark.parametrize("value", [0, True, 2.0, "all", None, [2]])
def test_mistake_in_a_key_of_two_types_is_told_once_by_the_keys_name(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        site(devices=value)
    least = "greater than or equal to 1" if value == 0 else "a valid integer"
    assert str(caught.value) == f"s.yaml: `devices` is {value!r}: input should be 'auto' or {least}"
    with pytest.raises(ConfigError) as caught:
        federation(strategy=strategy(downlink_rank="many"))
    assert str(caught.value) == "f.yaml: `strategy.downlink_rank` is 'many': input should be a valid integer or 'auto'"
    with pytest.raises(
        ConfigError,
        match=r"^f.yaml: `strategy.modules.1` is 5: input should be a valid string [^`]*$",
    ):
        federation(strategy=strategy(modules=["mlp", 5]))


def test_section_that_is_none_is_told_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"`delivery` is None: must be a section with the keys `deadline`$"):
        federation(delivery=None)
    with pytest.raises(ConfigError, match=r"`cohort` is 'buffered': must be a section with the keys `mode`, `size`"):
        federation(cohort="buffered")
    with pytest.raises(ConfigError, match=r"missing key `aggregation.method`; allowed: 'mean', 'trimmed-mean', "):
        federation(aggregation={"weights": "uniform"})


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("ledger", {"ledger": ""}),
        ("agreements", {"agreements": ""}),
        ("keep.model", {"keep": {"model": ""}}),
        ("model.path", {"model": ""}),
        ("data.path", {"data": {"path": "", "prompt": "q", "answer": "a"}}),
    ],
)
def test_no_path_is_empty(key: str, section: dict[str, Any]) -> None:
    """An empty one would be the folder of the file itself."""
    with pytest.raises(ConfigError, match=rf"^s.yaml: `{key}` is '': string should have at least 1 character$"):
        site(**section)
    with pytest.raises(ConfigError, match=r"`local.sites.0` is '': string should have at least 1 character$"):
        federation(local={"sites": [""]})
