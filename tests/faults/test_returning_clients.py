"""Sites that are killed and started again, or come late, keep the invariants of RoLoRA and FFA-LoRA."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.strategy import FFALoRAConfig
from common.data.tasks import make_task
from common.model.tuning import tune
from deploy.sandbox.flower import Flower, kill, wait_for
from deploy.sandbox.tiny import make_federation
from tests.faults.conftest import Note
from tests.harness.agreements import agree_all
from tests.harness.processes import ROOT
from tests.harness.results import lines

SIZES = {"site-a": 9, "site-b": 17}
ROUNDS = 4
QUIET = {"max_examples": 1, "generate": 0, "samples": 0, "every": 100}


def start(tmp_path: Path, strategy: str, rounds: int, needed: int = 2) -> Path:
    file = make_federation(
        tmp_path,
        SIZES,
        strategy=strategy,
        rounds=rounds,
        cohort={"min_clients": needed, "round_deadline": 180.0},
        evaluation=QUIET,
        training={"local_steps": 1},
    )
    return agree_all(file)


def happened(tmp_path: Path, **fields: object) -> bool:
    return any(fields.items() <= event.items() for event in lines(tmp_path / "run" / "events.jsonl"))


def site(tmp_path: Path, name: str) -> str:
    return f'site="{tmp_path / name}.yaml"'


def submit(flower: Flower, file: Path) -> None:
    flower.submit(ROOT, {"federation": str(file), "run-dir": str(file.parent / "run")})


def bytes_down(tmp_path: Path, name: str) -> dict[int, int]:
    train = [r for r in lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train" and r["client"] == name]
    return {r["round"]: r["bytes"]["down"] for r in train}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_and_restarted_site_gets_both_factors_and_joins_rolora_in_phase(tmp_path: Path, injected: Note) -> None:
    file = start(tmp_path, "rolora", ROUNDS)
    with Flower(tmp_path) as flower:
        flower.start_node("a", site(tmp_path, "site-a"))
        first = flower.start_node("b", site(tmp_path, "site-b"))
        submit(flower, file)
        wait_for(lambda: happened(tmp_path, event="round_started", round=2), 180)
        kill(first)
        injected("site killed and started again")
        flower.start_node("b-again", site(tmp_path, "site-b"))
        flower.wait(420)
    a, b = bytes_down(tmp_path, "site-a"), bytes_down(tmp_path, "site-b")
    assert sorted(a) == sorted(b) == list(range(1, ROUNDS + 1))  # its work of round 2 was given to it again
    steady = {n % 2: size for n, size in a.items() if n > 1}
    assert b[1] == b[2] == a[1]  # both factors
    assert all(b[n] == a[n] == steady[n % 2] < a[1] for n in b if n > 2)  # then what was averaged last
    events = lines(tmp_path / "run" / "events.jsonl")
    # Every reply that was taken in had proved, by its digest, that the frozen factor is the federation's.
    assert not [e for e in events if e["event"] == "update_refused"]
    assert [e["reason"] for e in events if e["event"] == "client_refused"] == [
        "site-b: a site of this name has already joined, and is still connected"
    ]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_late_site_receives_a_that_never_changes_in_ffa_lora(tmp_path: Path) -> None:
    file = start(tmp_path, "ffa-lora", 3, needed=1)
    with Flower(tmp_path) as flower:
        flower.start_node("a", site(tmp_path, "site-a"))
        submit(flower, file)
        wait_for(lambda: happened(tmp_path, event="round_started", round=1), 90)
        flower.start_node("b", site(tmp_path, "site-b"))
        flower.wait(240)
    a, b = bytes_down(tmp_path, "site-a"), bytes_down(tmp_path, "site-b")
    assert sorted(a) == [1, 2, 3]
    joined = min(b)
    assert joined > 1
    assert b[joined] == a[1]  # A and B
    assert {a[n] for n in (2, 3)} | {b[n] for n in b if n > joined} == {a[3]}  # B alone
    assert a[3] < a[1]
    assert not [e for e in lines(tmp_path / "run" / "events.jsonl") if e["event"] == "update_refused"]

    config = load(file, FederationConfig)
    assert isinstance(config.strategy, FFALoRAConfig)
    base = make_task(config.task).load(str(tmp_path / "model"), None, "float32", config.training.seed)
    initial = tune(base.model, config.strategy, "CAUSAL_LM", seed=config.training.seed).get()
    final = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert initial.keys() == final.keys()
    for name, tensor in initial.items():
        assert tensor.equal(final[name]) == (".lora_A." in name)
