"""What a strategy is stands in its section and its rule, is listed once, and is asked for by trait, not by class."""

import ast
import inspect
from pathlib import Path

import pytest

import strategies
from common.config import strategy as sections
from common.config.aggregation import MeanConfig
from common.config.federation import FederationConfig
from common.config.load import parse
from common.config.strategy import SECTIONS, FedFTGConfig, FLoRAConfig, name_of, names, title_of
from common.config.traits import StrategySection
from common.errors import ConfigError
from strategies import STRATEGIES
from strategies.flora import FLoRARule
from strategies.flower.named import make_rule

ROOT = Path(__file__).parents[2]
PRODUCT = ("common", "strategies", "client", "server", "deploy")


def federation(strategy: object) -> FederationConfig:
    training = {"learning_rate": 0.1, "local_steps": 1}
    data = {"name": "x", "model": {"path": "m"}, "strategy": strategy, "rounds": 1, "training": training}
    return parse(data, FederationConfig, "f")


def class_tests(path: Path, classes: set[str]) -> list[str]:
    """Where a file asks an object whether it is of one of these classes."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        asked: list[ast.AST] = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = [part for argument in node.args[1:] for part in ast.walk(argument)]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        used = {part.id if isinstance(part, ast.Name) else getattr(part, "attr", "") for part in asked}
        found += [f"{path}:{getattr(node, 'lineno', 0)}" for _ in used & classes]
    return found


def test_product_asks_a_strategy_for_its_traits_not_for_its_class() -> None:
    classes = {name for name, value in vars(sections).items() if inspect.isclass(value)}
    assert {"FedFTGConfig", "LoraConfig", "MergingLoraConfig", "FLoRAConfig"} <= classes
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    assert [where for file in files for where in class_tests(file, classes)] == []


def test_the_count_sees_every_way_to_ask(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "isinstance(x, FedITConfig)\nisinstance(x, A | s.FedITConfig)\nisinstance(x, (A, FedITConfig))\n"
        "match x:\n    case FedITConfig():\n        pass\nisinstance(x, A)\n"
    )
    assert len(class_tests(file, {"FedITConfig"})) == 4


def test_the_list_names_every_section_once_and_in_the_schemas_order() -> None:
    assert {name: rule.section for name, rule in STRATEGIES.items()} == {name_of(s): s for s in SECTIONS}
    assert list(STRATEGIES) == names()


@pytest.mark.parametrize("section", SECTIONS, ids=name_of)
def test_every_section_says_title_and_source_once(section: type[StrategySection]) -> None:
    assert (section.__doc__ or "").startswith(f"{section.title} ({section.source}): ")
    assert section.source.removeprefix("arXiv ") in (inspect.getmodule(STRATEGIES[name_of(section)]).__doc__ or "")  # type: ignore[union-attr]
    assert title_of(name_of(section)) == section.title


def test_a_label_is_its_own_title() -> None:
    assert title_of("my fedit") == "my fedit"


def test_all_traits_are_as_the_papers_say() -> None:
    """Each written out: a trait decides what leaves a site."""
    assert names(lambda s: s.trains == "weights") == ["fedftg"]
    assert names(lambda s: s.changes_base) == ["fedftg", "fedex-lora", "flora"]
    assert names(lambda s: s.private) == ["fedftg", "flexlora", "ffa-lora", "fedsvd", "rolora", "fedit"]
    assert names(lambda s: s.mixed_ranks) == ["flexlora", "flora"]
    assert names(lambda s: s.plain_mean_only is not None) == ["flexlora", "fedex-lora"]
    assert names(lambda s: not s.takes_server_optimizer) == ["flexlora", "fedsvd", "fedex-lora", "flora"]
    assert names(lambda s: s.stays_at_site == "B") == ["fedsa-lora"]
    assert names(lambda s: s.fresh_factors) == ["flora"]
    assert names(lambda s: s.needs_updates is None) == ["fedftg", "ffa-lora", "fedsvd", "rolora", "fedit", "fedsa-lora"]
    assert names(lambda s: s.needs_current is None) == [
        *("fedftg", "flexlora", "ffa-lora", "fedit", "fedsa-lora", "flora")
    ]
    assert names(lambda s: s.splits_anew) == ["flexlora", "fedsvd"]


@pytest.mark.parametrize("subspace", ["own", "shared"])
def test_section_and_rule_say_the_same_of_how_factors_travel(subspace: str) -> None:
    config = federation({"name": "fedftg", "rank": 3, "subspace": subspace, "wire_precision": "int8"}).strategy
    for server_round in (1, 2):
        at_site, at_server = config.exchange(7, server_round), make_rule(config, seed=7).exchange(server_round)
        assert at_site.precision == at_server.precision == "int8"
        assert (at_site.basis is None) == (at_server.basis is None) == (subspace == "own")
        if at_site.basis is not None and at_server.basis is not None:
            drawn = at_site.basis("w", (8, 5))
            assert drawn.shape == (3, 5)
            assert drawn.equal(at_server.basis("w", (8, 5)))
            assert not drawn.equal(config.exchange(7, server_round + 1).basis("w", (8, 5)))  # type: ignore[misc]


@pytest.mark.parametrize("given", [{}, {"update_proj_gap": None}, {"update_proj_gap": 200}])
def test_own_bases_are_refreshed_every_200_steps_when_nothing_else_is_said(given: dict[str, int | None]) -> None:
    config = federation({"name": "fedftg", **given}).strategy
    assert isinstance(config, FedFTGConfig)
    assert config.update_proj_gap == 200
    assert [config.bases(steps) for steps in (1, 200, 201)] == [1, 1, 2]


def test_shared_basis_takes_no_gap_and_is_read_again_as_it_was_sent() -> None:
    with pytest.raises(ConfigError, match="shared takes no `update_proj_gap`"):
        federation({"name": "fedftg", "subspace": "shared", "update_proj_gap": 5})
    with pytest.raises(
        ConfigError, match=r"`downlink_rank` auto with `subspace` shared, .*allowed with it: own, galore"
    ):
        federation({"name": "fedftg", "subspace": "shared", "downlink_rank": "auto"})
    config = federation({"name": "fedftg", "subspace": "shared"})
    assert parse(config.model_dump(mode="json"), FederationConfig, "sent") == config
    assert isinstance(config.strategy, FedFTGConfig)
    assert config.strategy.bases(1000) == 1


@pytest.mark.parametrize("name", names(lambda s: s.plain_mean_only is not None))
def test_rule_refuses_what_the_section_does(name: str) -> None:
    config = federation(name)
    for method in ("median", {"method": "mean", "clip_norm": 1.0}):
        with pytest.raises(ConfigError, match="allowed with it: `aggregation` mean without `clip_norm`"):
            parse({**config.model_dump(mode="json"), "aggregation": method}, FederationConfig, "f")
    with pytest.raises(ValueError, match=f"{name}: aggregation is .*; allowed: the plain mean"):
        make_rule(config.strategy, seed=0, aggregation=MeanConfig(clip_norm=1.0))


def test_flower_strategy_shows_the_rules_arguments_and_takes_flowers_by_name() -> None:
    assert list(inspect.signature(strategies.FLoRA).parameters) == [
        *("lora_alpha", "aggregation", "rslora", "max_rank", "seed", "options")
    ]
    assert FLoRAConfig.source in (strategies.FLoRA.__doc__ or "")
    made = strategies.FLoRA(8.0, rslora=True, seed=3, min_train_nodes=5)
    assert isinstance(made.rule, FLoRARule)
    assert (made.rule.lora_alpha, made.rule._rslora, made.rule._seed, made._seed) == (8.0, True, 3, 3)
    assert made.min_train_nodes == 5
    assert strategies.FLoRA is strategies.FLoRA
    with pytest.raises(TypeError, match="lora_alhpa"):
        strategies.FedIT(lora_alhpa=8.0)
    with pytest.raises(AttributeError, match="no attribute 'FedTI'"):
        _ = strategies.FedTI
