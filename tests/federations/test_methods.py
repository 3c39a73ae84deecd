"""The strategies that change more of a site than its adapter's tensors: base weights, or a B that stays."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import outcome, payload, records

IDS = torch.arange(5, 13)[None]
SIZES = {"site-a": 9, "site-b": 17}
LORA = {"modules": "linear", "blocks": "lower half", "rank": 4, "lora_alpha": 8.0}


@pytest.mark.parametrize(("strategy", "max_rank"), [("fedex-lora", None), ("flora", 2)])
def test_base_weights_change_by_small_steps_and_a_whole_model_comes_out(
    tmp_path: Path, strategy: str, max_rank: int | None
) -> None:
    file = make_federation(tmp_path, SIZES, strategy={"name": strategy, **LORA})
    if max_rank is not None:
        with (tmp_path / "site-b.yaml").open("a") as site:
            site.write(f"max_rank: {max_rank}\n")
    run = in_one_process(file)
    shapes = outcome(run)["trained"]
    assert shapes
    assert not [name for name in shapes if name.endswith(BASE_WEIGHT)]
    losses = {}
    for record in records(run, "train"):
        rank = max_rank if record["client"] == "site-b" and max_rank else 4
        own = {name: [rank if side == 4 else side for side in shape] for name, shape in shapes.items()}
        assert record["bytes"]["up"] == payload(own)
        assert (record["bytes"]["down"] == 0) == (record["round"] == 1)
        losses[record["client"], record["round"]] = record["train"]["loss"]
    assert losses["site-a", 2] < losses["site-a", 1]
    state = load_file(run / "checkpoints" / "round-000002" / "state.safetensors")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name in [name for name in state if name.endswith(BASE_WEIGHT)]:
        layer = name.removesuffix(BASE_WEIGHT)
        whole = state[name] + 2.0 * state[layer + LORA_B] @ state[layer + LORA_A]
        final = model.state_dict()[layer.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(final, whole, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(state[name], base[layer.removeprefix("base_model.model.") + ".weight"], atol=1e-6)
        assert strategy == "fedex-lora" or not state[layer + LORA_B].any()


def test_fedsas_b_stays_at_the_site_from_round_to_round(tmp_path: Path) -> None:
    file = make_federation(tmp_path, SIZES, strategy={"name": "fedsa-lora", **LORA}, evaluation={"server": None})
    run = in_one_process(file)
    shapes = outcome(run)["trained"]
    assert shapes
    assert all(name.endswith(LORA_A) for name in shapes)
    assert all(record["bytes"] == {"down": payload(shapes), "up": payload(shapes)} for record in records(run, "train"))
    found = {(r["client"], r["round"]): r["evaluate"]["loss"] for r in records(run, "evaluate")}
    for site in SIZES:  # the model with the site's own B, that without any being round 0's
        assert found[site, 2] < found[site, 1] < found[site, 0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain = base(input_ids=IDS).logits.detach()
    adapted = PeftModel.from_pretrained(base, run / "model")
    torch.testing.assert_close(adapted(input_ids=IDS).logits, plain)  # A alone changes nothing
