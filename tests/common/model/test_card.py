"""The card of a finished model: what may be in it, and the README.md that model hubs read."""

import json
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from common.config.load import parse
from common.errors import WireError
from common.model.card import Card, read_told, render

D1, D2, D3 = ("1" * 64, "2" * 64, "a" * 64)


def facts(**changes: Any) -> dict[str, Any]:
    """A card as a mapping; a mapping among the changes is merged into its section."""
    data: dict[str, Any] = {
        "federation": "icd",
        "task": {"type": "causal-lm"},
        "base": {"name": "smollm2", "digest": D1, "tokenizer_digest": D2, "dtype": "float32"},
        "strategy": {"name": "fedftg", "modules": ["up_proj", "down_proj"], "rank": 16},
        "form": "model",
        "round": 4,
        "rounds": 4,
        "sites": 3,
        "trained_digest": D3,
        "scores": {"loss": {"mean": 1.25, "deviation": 0.5, "sites": 2, "before": 3.0}},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in ("base", "strategy") else value
    return data


def card(**changes: Any) -> Card:
    return parse(facts(**changes), Card, "test")


def test_hub_reads_the_front_matter() -> None:
    licence = {"id": "other", "name": "gemma", "link": "https://ai.google.dev/gemma/terms"}
    made = card(base={"licence": licence}, form="adapter", strategy={"name": "fedit", "modules": "attention"})
    data = ModelCard(render(made), ignore_metadata_errors=False).data.to_dict()  # type: ignore[no-untyped-call]
    assert data == {
        "base_model": "smollm2",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "other",
        "license_name": "gemma",
        "license_link": "https://ai.google.dev/gemma/terms",
        "pipeline_tag": "text-generation",
        "tags": ["fedspan", "federated-learning", "fedit"],
    }


def test_page_tells_the_facts() -> None:
    page = render(card(privacy={"sites": 2, "epsilon": 7.5, "delta": 1e-5}, base={"revision": "c0ffee"}))
    for told in (
        "trained by 3 sites",
        "after round 4, the last of 4",
        "| Loss | 3.000 | 1.250 | 0.500 | 2 |",
        "- modules: `up_proj, down_proj`",
        "2 of 3 sites added noise",
        "epsilon 7.5 at most, at delta 1e-05",
        f"| base model, float32, revision `c0ffee` | `{D1}` |",
        f"| trained tensors | `{D3}` |",
        "licence of the base model is not known",
    ):
        assert told in page
    assert page == render(
        read_told(
            card(privacy={"sites": 2, "epsilon": 7.5, "delta": 1e-5}, base={"revision": "c0ffee"}).to_json(), Card
        )
    )
    assert "above 500" in render(card(privacy={"sites": 1, "epsilon": None, "delta": 1e-5}))
    assert "after round 2, the best by loss" in render(card(round=2, chosen="best", by="loss"))


@pytest.mark.parametrize(("personal", "told"), [(True, "holds one site's own"), (False, "lacks the sites' own")])
def test_page_tells_what_stays_at_the_sites(personal: bool, told: str) -> None:
    page = render(card(strategy={"name": "fedsa-lora", "modules": "attention"}, form="adapter", personal=personal))
    assert f"{told} LoRA factor B" in page
    assert "site's own" not in render(card(personal=personal)).partition("## Scores")[0]


def test_no_text_breaks_out_of_its_place() -> None:
    page = render(card(base={"name": "x` | y ![](http://e.org/i.png)"}, strategy={"modules": ["a`\n# b", "c|d"]}))
    assert "# b" not in page.splitlines()
    assert "- modules: `a  # b, c d`" in page.splitlines()
    assert "`x    y ![](http://e.org/i.png)`" in page
    assert yaml.safe_load(page.split("---\n")[1])["base_model"] == "x` | y ![](http://e.org/i.png)"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sites": 0}, "`sites` is 0"),
        ({"round": 5}, "`round` is 5"),
        ({"site_names": ["a"]}, "unknown key `site_names`"),
        ({"federation": "a/b"}, "`federation`"),
        ({"base": {"name": "a\nb"}}, "control characters"),
        ({"base": {"name": "a" * 257}}, "`base.name`"),
        ({"base": {"digest": "x"}}, "`base.digest`"),
        ({"trained_digest": D3[:-1]}, "`trained_digest`"),
        ({"chosen": "best"}, "`by`"),
        ({"by": "loss"}, "`by`"),
        ({"chosen": "best", "by": "[loss](https://example.org)"}, "`by`"),
        ({"scores": {"luck": {"mean": 1.0, "sites": 1}}}, "'luck' is no score"),
        ({"scores": {"loss": {"mean": float("nan"), "sites": 1}}}, "`scores.loss.mean`"),
        ({"scores": {"loss": {"mean": 1.0, "deviation": -1.0, "sites": 1}}}, "`scores.loss.deviation`"),
        ({"privacy": {"sites": 1, "epsilon": -1.0, "delta": 0.1}}, "`privacy.epsilon`"),
        ({"base": {"licence": {"id": "Free Beer"}}}, "`base.licence.id`"),
        ({"strategy": {"name": "magic"}}, "magic"),
    ],
)
def test_reader_refuses(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(WireError, match=told):
        read_told(json.dumps(facts(**changes)), Card)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 60_000, '"' + "a" * 70_000 + '"'])
def test_reader_refuses_what_is_no_card(text: str) -> None:
    with pytest.raises(WireError, match="model card"):
        read_told(text, Card)
