"""What the preflight says of memory, bytes and time, against a real training process and a real session's tensors."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client.preflight import memory, traffic
from client.preflight.steps import measured
from client.session import Session
from common.errors import TrainingError
from common.protocol.factors import num_bytes
from deploy.sandbox.tiny import make_tokenizer
from strategies.flower.named import make_rule
from tests.client.preflight.test_check import Files, files as files, look, output as output

FEDFTG = {"name": "fedftg", "blocks": "lower half", "rank": 4, "scale": 1.0}


def middle_sized(folder: Path) -> None:
    """Replace the model by one with 9.5 million parameters."""
    config = LlamaConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("strategy", [FEDFTG, pytest.param({"name": "fedit", "rank": 4}, marks=pytest.mark.long)])
def test_estimated_peak_is_the_measured_one(
    files: Files, strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a larger model adds to the resident peak of a real process, whose allocator keeps nothing to itself.

    The same process with a tiny model is taken off, because how much Python and its libraries hold differs by machine.
    """
    files.change("federation", strategy=strategy, training={"batch_size": 24, "packing": "off"})
    monkeypatch.setattr(memory, "_ALLOCATOR", 1.0)
    for limit in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(limit, "65536")

    def peaks() -> tuple[float, float]:
        subject = files.subject()
        peak = memory.estimate(subject.tuned, subject.settings, subject.largest(24), subject.steps, None)
        estimated = peak.total + memory.host_bytes(subject.tuned, subject.settings.strategy, 0, 0)
        return estimated, measured(files.site, files.federation, 2, 200.0)["host"]

    tiny = peaks()
    middle_sized(files.site.parent / "model")
    middle = peaks()
    estimated, real = (large - small for large, small in zip(middle, tiny, strict=True))
    assert 0.95 * real < estimated < 1.3 * real


@pytest.mark.parametrize(
    ("strategy", "number"),
    [
        (FEDFTG, 1),
        ({**FEDFTG, "update_proj_gap": 2}, 1),
        ({**FEDFTG, "subspace": "shared"}, 1),
        ({**FEDFTG, "subspace": "shared", "optimizer_state": "averaged"}, 1),
        ({**FEDFTG, "wire_precision": "int8"}, 1),
        ({"name": "fedit", "rank": 2}, 1),
        ({"name": "ffa-lora", "rank": 2}, 1),
        ({"name": "flexlora", "rank": 2}, 1),
    ],
)
def test_bytes_up_are_those_that_a_session_sends(files: Files, strategy: dict[str, Any], number: int) -> None:
    files.change("federation", strategy=strategy)
    subject = files.subject()
    session = Session(subject.site, subject.site_file, subject.settings)
    session.hello()
    sent, _ = session.train(number, make_rule(subject.settings.strategy, seed=0).active(number, session.exchanged))
    down, up = traffic.bytes_per_round(subject.settings, dict(subject.tuned.parameters), subject.steps)
    assert up == num_bytes(sent.values())
    assert down == up  # of one site


def test_bytes_down_grow_with_the_sites_but_not_in_a_shared_subspace_nor_with_a_limit(files: Files) -> None:
    def down(strategy: dict[str, Any], sites: int) -> int:
        files.change("federation", strategy=strategy, cohort={"min_clients": sites})
        subject = files.subject()
        return traffic.bytes_per_round(subject.settings, dict(subject.tuned.parameters), subject.steps)[0]

    small = {**FEDFTG, "rank": 1}
    assert 1.9 < down(small, 4) / down(small, 2) < 2.1
    shared = {**small, "subspace": "shared"}
    assert down(shared, 4) == down(shared, 2)
    assert down({**small, "downlink_rank": "auto"}, 4) == down(small, 1)


def test_training_that_is_killed_for_its_memory_fails_and_not_the_check(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    finding = look("training", files.subject(measure=True))
    assert finding.level == "FAIL"
    assert finding.found == "training was killed by signal 9, most likely for its memory"
    assert "`max_batch_size`" in finding.mend


def test_training_that_takes_longer_than_the_deadline_fails(files: Files) -> None:
    with pytest.raises(TrainingError, match="took longer than"):
        measured(files.site, files.federation, 1, 0.01)


def test_codes_are_counted_and_the_whole_model_where_one_is_written(files: Files) -> None:
    def peak() -> tuple[memory.Peak, int]:
        subject = files.subject()
        found = memory.estimate(subject.tuned, subject.settings, subject.largest(4), 3, None)
        return found, memory.whole_bytes(subject.tuned, subject.settings.strategy)

    whole, written = peak()
    assert written == 0  # it is in memory
    in_files = sum(p.nbytes for p in files.subject().base.model.parameters())
    files.change("federation", model={"path": "model", "quantization": "nf4"})
    codes, written = peak()
    assert codes.weights < 0.7 * whole.weights  # embeddings and trained weights are whole
    assert (codes.state, codes.gradients) == (whole.state, whole.gradients)
    assert written == in_files
    files.change("federation", strategy={"name": "fedit", "rank": 4})
    assert peak()[1] == 0  # an adapter


def test_gradients_kept_for_a_basis_are_counted(files: Files) -> None:
    subject = files.subject()
    tuned, settings = subject.tuned, subject.settings
    whole = memory.estimate(tuned, settings, subject.largest(4), 3, None)
    parts = memory.estimate(tuned, settings, subject.largest(2), 3, None)
    assert whole.gradients == 0
    assert parts.gradients == num_bytes(tuned.parameters.values())
    assert parts.passes < whole.passes
    half = memory.estimate(tuned, settings, subject.largest(4), 3, torch.bfloat16)
    assert half.passes < whole.passes
