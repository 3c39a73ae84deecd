"""The table of what fits on which card: a model of shapes alone is estimated as the model with values is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import memory_table
from client.preflight.memory import Batch, estimate
from client.training.settings import held
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.data.tasks import make_task
from common.model.tuning import tune
from deploy.sandbox.tiny import make_tokenizer

SMALL = (64, 96, 3, 4, 2, 320, True)


@pytest.mark.parametrize("way", ["FedFTG, nf4", "LoRA, int8"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_model_of_shapes_alone_needs_what_the_real_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setitem(memory_table.SHAPES, "small", SMALL)
    strategy, quantization = memory_table.WAYS[way]
    strategy = {**strategy, "rank": 8}
    found = memory_table.peaks("small", strategy, quantization, length=32)
    LlamaForCausalLM(memory_table.config_of("small")).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    settings: dict[str, Any] = {
        "name": "real",
        "model": {"path": str(tmp_path), "dtype": "bfloat16", "quantization": quantization},
        "strategy": strategy,
        "rounds": 1,
        "training": {"learning_rate": 1e-4, "local_steps": 10, "max_length": 32, "gradient_checkpointing": True}
        | {"batch_size": 4},
    }
    federation = FederationConfig.model_validate(settings)
    site = SiteConfig.model_validate({"name": "x", "data": {"path": "x", "prompt": "p", "answer": "a"}})
    base = make_task(federation.task).load(str(tmp_path), None, "bfloat16", 0, held(site, federation))
    real = estimate(tune(base.model, federation.strategy, "CAUSAL_LM"), federation, Batch(4, 32), 10, torch.bfloat16)
    assert found[4] * 1e9 == pytest.approx(real.total, rel=1e-3)


@pytest.mark.long
def test_lower_third_of_8b_on_4_bit_codes_fits_24_gb() -> None:
    strategy, quantization = memory_table.WAYS["FedFTG, nf4"]
    assert memory_table.peaks("8B", strategy, quantization)[1] < 23
