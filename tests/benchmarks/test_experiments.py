"""The experiments that are published load, in all of their scales, whether or not their data is there."""

import json
from pathlib import Path

import pytest
import yaml

import benchmarks
from benchmarks.experiments import private
from common.config.load import load
from common.config.site import PrivacyConfig, SiteConfig
from deploy.experiment.config import load_experiment

FILES = sorted((Path(benchmarks.__file__).parent / "experiments").rglob("*.yaml"))
OF_SOME = {  # not which strategy is best, but with how many sites one still learns, or which options
    "private": {"ffa-lora"},
    "titles-fifty": {"fedit", "ffa-lora", "flexlora", "rolora"},
    "coding-dense": {"dense", "own", "keep", "shared"},
    "coding-dense-ranks": {"own", "shared"},
    "fedftg_text-weighted": {"fedftg", "flexlora", "ffa-lora", "rolora"},
    "fedftg_text": {"as-released", "fedftg", "ffa-lora", "rolora"},  # uniform weights, with which FlexLoRA does not go
}
SCALES = [(file, scale) for file in FILES for scale in (None, *yaml.safe_load(file.read_text()).get("scales", {}))]


@pytest.mark.parametrize(
    ("file", "scale"), SCALES, ids=[f"{file.parent.name}-{file.stem}-{scale}" for file, scale in SCALES]
)
def test_published_experiment_loads_and_compares_fedftg_with_lora(file: Path, scale: str | None) -> None:
    names = {choice.called for choice in load_experiment(file, scale).grid.strategies}
    some = OF_SOME.get(f"{file.stem}-{scale}", OF_SOME.get(file.stem))
    assert (some or {"fedftg", "flexlora", "ffa-lora", "rolora"}) <= names


def test_sites_of_the_private_experiment_share_no_row_and_no_category_with_the_test(tmp_path: Path) -> None:
    codes = "".join(
        f"<diag><name>{letter}{n:02}</name><desc>{word} {n}</desc>"
        f"<diag><name>{letter}{n:02}.1</name><desc>{word} {n}, other</desc></diag></diag>"
        for letter, word in (("C", "tumour"), ("I", "infarct"))
        for n in range(100)
    )
    chapters = codes.replace("<diag><name>I00<", "</chapter><chapter><name>9</name><diag><name>I00<", 1)
    xml = tmp_path / "tabular.xml"
    xml.write_text(f"<list><chapter><name>2</name>{chapters}</chapter></list>")
    private.make(xml, tmp_path)
    rows = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.rglob("*.jsonl")}
    test = {row["title"].partition(",")[0] for row in rows[tmp_path / "test.jsonl"]}
    trained = [row["title"] for file, found in rows.items() if file.parent.name == "10" for row in found]
    assert len(test) > 20
    assert len(trained) == len(set(trained)) > 100
    assert not test & {title.partition(",")[0] for title in trained}
    for kind, privacy in (("10", private.PRIVACY), ("10-open", None)):
        site = load(tmp_path / kind / "site-010.yaml", SiteConfig)
        assert site.privacy == (privacy and PrivacyConfig(**privacy))
        assert (tmp_path / kind / site.data.path).exists()
