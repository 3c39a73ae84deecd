"""A mistake in either file becomes one clear error that names file, key, value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.aggregation import FedAdamConfig, FedAvgMConfig, KrumConfig, MeanConfig, MedianConfig
from common.config.federation import FederationConfig, resolved, settings_for_sites
from common.config.load import load, parse
from common.config.site import SiteConfig
from common.config.strategy import FedFTGConfig
from common.errors import ConfigError

FEDERATION = """
name: icd
model: {path: model}
strategy: fedftg
rounds: 3
training: {learning_rate: 1.0e-3, local_steps: 4}
local: {sites: [site-a.yaml]}
"""
SITE = """
name: site-a
data: {path: rows.jsonl, prompt: term, answer: title}
"""


def federation(tmp_path: Path, text: str) -> FederationConfig:
    file = tmp_path / "federation.yaml"
    file.write_text(text)
    return load(file, FederationConfig)


def test_strategy_may_be_one_word(tmp_path: Path) -> None:
    assert federation(tmp_path, FEDERATION).strategy == FedFTGConfig()


def test_aggregation_may_be_one_word_and_is_the_plain_mean_when_not_given(tmp_path: Path) -> None:
    assert federation(tmp_path, FEDERATION).aggregation == MeanConfig()
    assert federation(tmp_path, FEDERATION + "aggregation: median\n").aggregation == MedianConfig()
    text = FEDERATION + "aggregation: {method: krum, byzantine: 1}\ncohort: {min_clients: 5}\n"
    assert federation(tmp_path, text).aggregation == KrumConfig(byzantine=1)


def test_server_optimizer_may_be_one_word_or_none(tmp_path: Path) -> None:
    assert federation(tmp_path, FEDERATION).server_optimizer is None
    assert federation(tmp_path, FEDERATION + "server_optimizer: none\n").server_optimizer is None
    assert federation(tmp_path, FEDERATION + "server_optimizer: fedavgm\n").server_optimizer == FedAvgMConfig()
    config = federation(tmp_path, FEDERATION + "server_optimizer: {method: fedadam, learning_rate: 0.01}\n")
    assert config.server_optimizer == FedAdamConfig(learning_rate=0.01)
    assert resolved(config, tmp_path / "federation.yaml").server_optimizer == config.server_optimizer
    sent = parse(yaml.safe_load(settings_for_sites(config)), FederationConfig, "message")
    assert sent.server_optimizer == config.server_optimizer  # it says how far a state can move


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rounds: 3", "roundz: 3", "unknown key `roundz`; did you mean `rounds`?"),
        ("rounds: 3", "rounds: 0", "`rounds` is 0: input should be greater than or equal to 1"),
        ("rounds: 3", "rounds: '3'", "`rounds` is '3': input should be a valid integer"),
        ("rounds: 3\n", "", "missing key `rounds`"),
        ("local_steps: 4", "local_stps: 4", "unknown key `training.local_stps`; did you mean `local_steps`?"),
        (
            "1.0e-3",
            "1e-3",
            "`training.learning_rate` is '1e-3': input should be a valid number (YAML reads this as text",
        ),
        ("local_steps: 4", "batch_size: 4", "give exactly one of `local_steps` and `local_epochs`"),
        ("fedftg", "fedfgt", "`strategy.name` is 'fedfgt'; allowed: 'fedftg', "),
        ("fedftg", "{name: fedftg, rnak: 3}", "unknown key `strategy.rnak`; did you mean `rank`?"),
        ("fedftg", "{name: rolora, optimizer_state: keep}", "`strategy.optimizer_state` is 'keep'"),
        (
            "fedftg",
            "{name: fedftg, projection: none, scale: 1.0}",
            "`projection` none takes no `subspace`, `scale` and",
        ),
        ("fedftg", "{name: fedftg, projection: none, update_proj_gap: 5}", "takes no `update_proj_gap` and no"),
        (
            "fedftg",
            "{name: fedftg, subspace: shared, optimizer_state: keep}",
            "keep with `subspace` shared, whose bases",
        ),
        ("rounds: 3", "rounds: 3\naggregation: {method: mean, weights: equal}", "`aggregation.weights` is 'equal'"),
        ("fedftg", "flexlora\naggregation: {method: mean, weights: uniform}", "flexlora averages products"),
        (
            "fedftg",
            "{name: fedftg, optimizer_state: averaged}",
            "averaged with `subspace` own and",
        ),
        (
            "fedftg",
            "{name: fedftg, subspace: shared, moments: 8bit, optimizer_state: averaged}",
            "and `moments` 8bit; al",
        ),
        (
            "strategy: fedftg",
            "strategy: {name: fedftg, subspace: shared, optimizer_state: averaged}\nserver_optimizer: fedavgm",
            "no weights that `server_optimizer` fedavgm could move; allowed with it: none",
        ),
        ("fedftg", "{name: rolora, head: train}", "`strategy.head` is 'train', but `task` causal-lm has no"),
        (
            "fedftg",
            "rolora\ntask: {type: sequence-classification, labels: [a, b]}",
            "missing key `strategy.head`: how the classifier's head is treated; allowed: train, freeze or local",
        ),
        (
            "fedftg",
            "{name: fedftg, head: tune}\ntask: {type: image-classification, labels: [a, b]}",
            "`strategy.head` is 'tune': input should be 'train', 'freeze' or 'local'",
        ),
        ("{path: model}", "{path: model, hub: a/b}", "`model`: give exactly one of `path` and `hub`"),
        ("{path: model}", "{hub: a/b}", "`revision` (a commit of the hub model) is required with `hub`"),
        (
            "rounds: 3",
            "rounds: 3\naggregation: medain",
            "`aggregation.method` is 'medain'; allowed: 'mean', 'trimmed-mean', 'median', 'krum', 'multi-krum' (did "
            "you mean 'median'?)",
        ),
        ("rounds: 3", "rounds: 3\naggregation: trimmed-mean", "missing key `aggregation.trim` (Share of the updates"),
        (
            "rounds: 3",
            "rounds: 3\naggregation: {method: trimmed-mean, trim: 0.5}",
            "`aggregation.trim` is 0.5: input should be less than 0.5",
        ),
        (
            "rounds: 3",
            "rounds: 3\naggregation: {method: median, trim: 0.1}",
            "unknown key `aggregation.trim`; allowed here: `clip_norm`, `method`",
        ),
        ("rounds: 3", "rounds: 3\naggregation: multi-krum", "missing key `aggregation.byzantine` (f: number of sites"),
        (
            "rounds: 3",
            "rounds: 3\naggregation: {method: krum, byzantine: 0, clip_norm: 2.0}",
            "unknown key `aggregation.clip_norm`; allowed here: `byzantine`, `method`",
        ),
        (
            "rounds: 3",
            "rounds: 3\naggregation: {method: krum, byzantine: 1}\ncohort: {min_clients: 4}",
            "`cohort.min_clients` is 4; `aggregation` krum with `byzantine` 1 needs at least 5",
        ),
        (
            "rounds: 3",
            "rounds: 3\naggregation: {method: mean, clip_norm: 0.0}",
            "`aggregation.clip_norm` is 0.0: input should be greater than 0",
        ),
        ("rounds: 3", "rounds: 3\nserver_optimizer: fedadam", "missing key `server_optimizer.learning_rate` (Server's"),
        (
            "rounds: 3",
            "rounds: 3\nserver_optimizer: adam",
            "`server_optimizer.method` is 'adam'; allowed: 'fedavgm', 'fedadam'",
        ),
        (
            "rounds: 3",
            "rounds: 3\nserver_optimizer: {method: fedavgm, momentum: 1.0}",
            "`server_optimizer.momentum` is 1.0: input should be less than 1",
        ),
        ("fedftg", "flexlora\nserver_optimizer: fedavgm", "`strategy` flexlora does not average what it trains"),
        ("fedftg", "fedex-lora\nserver_optimizer: fedavgm", "`strategy` fedex-lora does not average what it trains"),
        (
            "fedftg",
            "flora\nserver_optimizer: fedavgm",
            "so that `server_optimizer` fedavgm has no change to go on with",
        ),
        ("fedftg", "fedex-lora\naggregation: median", "`strategy` fedex-lora adds to the base weights what the means"),
        ("fedftg", "{name: flora, merge: false}", "`strategy.merge` is False: input should be True"),
        (
            "fedftg",
            "fedsa-lora\nevaluation: {server: {path: x.jsonl, prompt: p, answer: a}}",
            "fedsa-lora keeps every B at its site, so that the server has no model of its own to evaluate",
        ),
        ("fedftg", "flexlora\naggregation: median", "`strategy` flexlora averages products; allowed with it: "),
        ("fedftg", "flexlora\naggregation: {method: mean, clip_norm: 1.0}", "flexlora averages products"),
        ("name: icd", "name: ../icd", "`name` is '../icd'"),
        ("name: icd", "name: icd\nname: two", "key 'name' appears twice"),
        ("name: icd", "name: [icd", "not valid YAML"),
    ],
)
def test_mistake_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in FEDERATION
    with pytest.raises(ConfigError) as caught:
        federation(tmp_path, FEDERATION.replace(old, new))
    assert str(caught.value).startswith(f"{tmp_path / 'federation.yaml'}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        federation(tmp_path, FEDERATION.replace("rounds: 3", "roundz: 3\nrounds: 3").replace("1.0e-3", "-1.0"))
    assert "unknown key `roundz`" in str(caught.value)
    assert "`training.learning_rate` is -1.0: input should be greater than 0" in str(caught.value)


def test_missing_file_and_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.yaml", SiteConfig)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="must be a mapping with the keys `name`, `data`"):
        load(tmp_path / "empty.yaml", SiteConfig)


def test_site_file_names_its_nested_keys(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(SITE.replace("prompt: term", "promt: term"))
    with pytest.raises(ConfigError, match=r"unknown key `data.promt`; did you mean `prompt`\?"):
        load(file, SiteConfig)


@pytest.mark.parametrize("given", ["prompt: term", "messages: m\n  prompt: term\n  answer: title", "held_out: 0.1"])
def test_data_takes_prompt_and_answer_or_messages(tmp_path: Path, given: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(f"name: site-a\ndata:\n  path: rows.jsonl\n  {given}\n")
    with pytest.raises(ConfigError, match="`data`: give `prompt` and `answer`, or `messages` alone"):
        load(file, SiteConfig)
    file.write_text("name: site-a\ndata: {path: rows.jsonl, messages: m}\n")
    assert load(file, SiteConfig).data.messages == "m"


@pytest.mark.parametrize("word", ["yes", "0", "2020-01-01"])
def test_word_that_yaml_reads_as_no_text_wants_quotes(tmp_path: Path, word: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(SITE.replace("prompt: term", f"prompt: {word}"))
    with pytest.raises(ConfigError, match=r"`data.prompt` is .*: input should be a valid string .*put it in quotes"):
        load(file, SiteConfig)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = resolved(federation(tmp_path, FEDERATION), tmp_path / "federation.yaml")
    assert config.model.path == str(tmp_path / "model")
    assert config.local is not None
    assert config.local.sites == [str(tmp_path / "site-a.yaml")]
    assert resolved(config, Path("/elsewhere/f.yaml")) == config


def test_sites_receive_all_but_the_servers_own_settings(tmp_path: Path) -> None:
    text = FEDERATION + "evaluation: {every: 2, server: {path: secret.jsonl, prompt: term, answer: title}}\n"
    text += "admission: {norm_ratio: 7.0, max_rows: 900, max_noise: 0.5}\n"
    config = federation(tmp_path, text + "aggregation: {method: mean, clip_norm: 2.0}\n")
    assert resolved(config, tmp_path / "federation.yaml").aggregation == MeanConfig(clip_norm=2.0)
    sent = settings_for_sites(config)
    assert "secret" not in sent
    assert "site-a" not in sent
    assert "aggregation" not in sent
    received = parse(yaml.safe_load(sent), FederationConfig, "message")
    assert received.evaluation.every == 2
    assert "norm_ratio" not in sent
    assert (received.admission.max_rows, received.admission.max_noise) == (900, 0.5)
    assert received.training == config.training


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ({"name": "fedftg", "optimizer_state": "keep"}, "`strategy.optimizer_state` keep needs 1"),
        ({"name": "fedsa-lora"}, "`strategy` fedsa-lora, which keeps every B there, needs 1"),
        ({"name": "fedit"}, None),
    ],
)
def test_rare_checkpoints_do_not_go_with_what_sites_keep(strategy: dict[str, Any], reason: str | None) -> None:
    settings = {"name": "x", "model": {"path": "m"}, "rounds": 9, "training": {"learning_rate": 0.1, "local_steps": 1}}
    settings |= {"strategy": strategy, "checkpoint": {"every": 5}}
    if reason is None:
        assert parse(settings, FederationConfig, "f").checkpoint.every == 5
        return
    with pytest.raises(ConfigError, match=f"`checkpoint.every` is 5, and sites can go back by one round.*{reason}"):
        parse(settings, FederationConfig, "f")
