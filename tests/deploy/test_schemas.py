"""The published schemas are those of the code, and the commented examples follow them."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.section import Section
from common.config.site import SiteConfig
from common.config.strategy import names
from common.protocol.exchanges import ExchangeReply, ExchangeRequest, MaskedTrainReply, MaskedTrainRequest
from common.protocol.messages import EvaluateReply, Hello, TrainReply, TrainRequest
from deploy.experiment.config import load_experiment
from deploy.schemas import schemas, written

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
EXPERIMENTS = sorted((Path(__file__).parents[2] / "benchmarks" / "experiments").glob("*.yaml"))
EXAMPLES: list[tuple[str, type[Section]]] = [
    ("federation", FederationConfig),
    *((f"site-{x}", SiteConfig) for x in "abc"),  # type: ignore[list-item]
]


def schema(name: str) -> dict[str, object]:
    (text,) = [text for path, text in schemas().items() if path.name == f"{name}.schema.json"]
    return dict(yaml.safe_load(text))


def test_files_are_up_to_date() -> None:
    for path, text in written().items():
        assert path.read_text() == text, f"{path} is out of date; run fedspan schemas"


def test_page_of_what_leaves_names_everything_that_does() -> None:
    (page,) = [text for path, text in written().items() if path.name == "what-leaves.md"]
    masked = (ExchangeReply, ExchangeRequest, MaskedTrainReply, MaskedTrainRequest)
    for content in (Hello, TrainReply, EvaluateReply, TrainRequest, *masked):
        assert all(f"| `{key}` |" in page for record, keys in content.known().items() for key in keys or [record])
    lines = page.splitlines()
    assert (
        "| `arrays` | the tensors that were asked for, as trained | tensors | leaves | leaves, clipped and noised |"
        in lines
    )
    assert "| `num-examples` | number of training rows | a whole number from 1 | leaves | leaves |" in lines
    loss = "a number from 0; above 1e+09, and nan, as infinite: the model has diverged"
    assert f"| `train.loss` | mean training loss | {loss} | stays | stays |" in lines
    assert "| `seconds.train` | seconds to train | a number from 0 to 1e+15 | leaves | stays |" in lines
    assert "| 1020 | DataError | A shard is missing, empty or malformed. | a fixed sentence, as code 1000 |" in lines
    assert any(line.startswith("| 1060 | PolicyError | ") and line.endswith(" | the same |") for line in lines)


@pytest.mark.parametrize(("name", "section"), EXAMPLES)
def test_examples_follow_schema_and_code_and_explain_themselves(name: str, section: type[Section]) -> None:
    file = DEMO / f"{name}.yaml"
    load(file, section)
    jsonschema.validate(yaml.safe_load(file.read_text()), schema(name.partition("-")[0]))
    assert f"../schemas/{name.partition('-')[0]}.schema.json" in file.read_text().splitlines()[0]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiments_follow_schema_and_code_in_every_scale(file: Path) -> None:
    data = json.loads(json.dumps(yaml.safe_load(file.read_text())))  # numbers as keys become strings, as in an editor
    jsonschema.validate(data, schema("experiment"))
    for scale in (None, *data["scales"]):
        assert load_experiment(file, scale).name == file.stem
    assert "/schemas/experiment.schema.json" in file.read_text().splitlines()[0]


def test_experiment_schema_refuses_what_the_code_refuses() -> None:
    data = json.loads(json.dumps(yaml.safe_load(EXPERIMENTS[0].read_text())))
    for wrong in ({**data, "grids": {}}, {**data, "grid": {**data["grid"], "seeds": []}}, {**data, "select_by": "f2"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema("experiment"))


@pytest.mark.parametrize("strategy", names())
def test_schema_takes_a_strategy_as_one_word_or_as_a_section(strategy: str) -> None:
    data = yaml.safe_load((DEMO / "federation.yaml").read_text())
    for value in (strategy, {"name": strategy, "rank": 4}):
        jsonschema.validate({**data, "strategy": value}, schema("federation"))


@pytest.mark.parametrize("value", ["median", {"method": "trimmed-mean", "trim": 0.2, "clip_norm": 2.0}])
def test_schema_takes_an_aggregation_as_one_word_or_as_a_section(value: object) -> None:
    data = yaml.safe_load((DEMO / "federation.yaml").read_text())
    jsonschema.validate({**data, "aggregation": value}, schema("federation"))


@pytest.mark.parametrize("value", ["none", "fedavgm", {"method": "fedadam", "learning_rate": 0.01}, None])
def test_schema_takes_a_server_optimizer_as_one_word_or_as_a_section(value: object) -> None:
    data = yaml.safe_load((DEMO / "federation.yaml").read_text())
    jsonschema.validate({**data, "server_optimizer": value}, schema("federation"))


@pytest.mark.parametrize(
    "change",
    [
        {"roundz": 3},
        {"rounds": "3"},
        {"strategy": "fedfgt"},
        {"strategy": {"rank": 4}},
        {"aggregation": "krum"},
        {"server_optimizer": "fedadam"},
        {"server_optimizer": {"momentum": 0.9}},
        {"aggregation": {"method": "median", "trim": 0.2}},
    ],
)
def test_schema_refuses_what_the_code_refuses(change: dict[str, object]) -> None:
    data = {**yaml.safe_load((DEMO / "federation.yaml").read_text()), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema("federation"))
