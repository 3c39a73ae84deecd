"""The strategies that change more of a site than its adapter's tensors: base weights, or a B that stays."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.model.adapters import BASE_WEIGHT, LORA_A, LORA_B
from deploy.sandbox.tiny import make_federation
from tests.harness.launcher import launch, survivors
from tests.processes.test_lora import payload, records, trained_shapes

IDS = torch.arange(5, 13)[None]
LORA = {"modules": "linear", "blocks": "lower half", "rank": 4, "lora_alpha": 8.0}

pytestmark = pytest.mark.long  # tests/client/test_methods_apps.py runs both apps in one process


def run(folder: Path, strategy: str, max_rank: int | None = None, **changes: object) -> Path:
    """A federation of two sites that ended well."""
    file = make_federation(folder, {"site-a": 9, "site-b": 17}, strategy={"name": strategy, **LORA}, **changes)
    if max_rank is not None:
        with (folder / "site-b.yaml").open("a") as site:
            site.write(f"max_rank: {max_rank}\n")
    done = launch(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert survivors(file) == []
    return file


@pytest.mark.parametrize(("strategy", "max_rank"), [("fedex-lora", None), ("flora", 2)])
def test_base_weights_change_by_small_steps_and_a_whole_model_comes_out(
    tmp_path: Path, strategy: str, max_rank: int | None
) -> None:
    file = run(tmp_path, strategy, max_rank)
    folder, shapes = file.parent / "runs" / "tiny", trained_shapes(file)
    assert shapes
    assert not [name for name in shapes if name.endswith(BASE_WEIGHT)]
    losses = {}
    for record in records(file, "train"):
        rank = max_rank if record["client"] == "site-b" and max_rank else 4
        own = {name: [rank if side == 4 else side for side in shape] for name, shape in shapes.items()}
        assert record["bytes"]["up"] == payload(own)  # type: ignore[index]
        assert (record["bytes"]["down"] == 0) == (record["round"] == 1)  # type: ignore[index]
        losses[record["client"], record["round"]] = record["train"]["loss"]  # type: ignore[index]
    assert losses["site-a", 2] < losses["site-a", 1]
    state = load_file(folder / "checkpoints" / "round-000002" / "state.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name in [name for name in state if name.endswith(BASE_WEIGHT)]:
        layer = name.removesuffix(BASE_WEIGHT)
        whole = state[name] + 2.0 * state[layer + LORA_B] @ state[layer + LORA_A]
        final = model.state_dict()[layer.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(final, whole, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(state[name], base[layer.removeprefix("base_model.model.") + ".weight"], atol=1e-6)
        assert strategy == "fedex-lora" or not state[layer + LORA_B].any()


def test_fedsas_b_stays_at_the_site_from_round_to_round(tmp_path: Path) -> None:
    file = run(tmp_path, "fedsa-lora", evaluation={"server": None})
    shapes = trained_shapes(file)
    assert shapes
    assert all(name.endswith(LORA_A) for name in shapes)
    assert all(record["bytes"] == {"down": payload(shapes), "up": payload(shapes)} for record in records(file, "train"))
    found = {
        (record["client"], record["round"]): record["evaluate"]["loss"]  # type: ignore[index]
        for record in records(file, "evaluate")
    }
    for site in ("site-a", "site-b"):  # the model with the site's own B, that without any being round 0's
        assert found[site, 2] < found[site, 1] < found[site, 0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain = base(input_ids=IDS).logits.detach()
    adapted = PeftModel.from_pretrained(base, file.parent / "runs" / "tiny" / "model")
    torch.testing.assert_close(adapted(input_ids=IDS).logits, plain)  # A alone changes nothing
