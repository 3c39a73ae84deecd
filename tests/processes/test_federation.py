"""A true federation: SuperLink, SuperNodes and the run as separate processes over gRPC on loopback."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from client.session import Session
from common.config.federation import FederationConfig, SiteConfig, resolved, settings_for_sites
from common.config.load import load, parse
from deploy.sandbox.tiny import make_federation
from tests.harness.launcher import launch, survivors

SIZES = {"site-a": 9, "site-b": 17, "site-c": 30}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three sites that has run to its end."""
    folder = tmp_path_factory.mktemp("federation")
    file = make_federation(folder, SIZES, strategy={"rank": 2}, evaluation={"generate": 2})
    done = launch(file)
    assert done.returncode == 0, done.stdout + done.stderr
    return file


def metrics(federation: Path) -> list[dict[str, object]]:
    file = federation.parent / "runs" / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@cache
def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_average_equals_an_independent_float64_computation(federation: Path) -> None:
    torch.set_num_threads(1)  # as the launcher does for three sites on two cores
    config = parse(
        json.loads(settings_for_sites(resolved(load(federation, FederationConfig), federation))),
        FederationConfig,
        "sent",
    )
    state: dict[str, torch.Tensor] | None = None
    for server_round in (1, 2):
        replies = []
        for site in SIZES:
            file = federation.parent / f"{site}.yaml"
            session = Session(load(file, SiteConfig), file, config)
            start = session._tuned.get() if state is None else state
            session.set_state(start, None, list(start))
            session.train(server_round, list(start))
            replies.append(
                (session._tuned.get(), session.train_rows)
            )  # the weights as they are, whatever form they travel in
        total = sum(rows for _, rows in replies)
        state = {
            name: torch.from_numpy(
                sum(
                    (t[name].numpy().astype(np.float64) * (rows / total) for t, rows in replies),
                    start=np.zeros(tuple(replies[0][0][name].shape)),
                ).astype(np.float32)
            )
            for name in replies[0][0]
        }
    assert state is not None
    exported = final(federation.parent / "runs" / "tiny" / "model")
    base = final(federation.parent / "model")
    for name, expected in state.items():
        assert not torch.equal(base[name], expected)
        # Relative to the change: two rounds of Adam amplify the last bits of single entries that are near zero.
        assert float((exported[name] - expected).norm() / (expected - base[name]).norm()) < 1e-5


def test_frozen_tensors_are_byte_identical_and_never_travel(federation: Path) -> None:
    base, exported = final(federation.parent / "model"), final(federation.parent / "runs" / "tiny" / "model")
    trained = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")}
    assert base.keys() == exported.keys()
    assert {name for name in base if not torch.equal(base[name], exported[name])} == trained
    # Three steps with a refresh every second: two bases of rank 2, so that factors are the smaller form, also of the
    # three sites together. Round 1 starts from the base model, which every site has.
    up, down = (payload({name: base[name].shape for name in trained}, rank) for rank in (4, 12))
    for record in metrics(federation):
        if record["phase"] == "train":
            assert record["bytes"] == {"down": 0 if record["round"] == 1 else down, "up": up}


def payload(shapes: dict[str, torch.Size], rank: int) -> int:
    """Bytes of small weights' factors in a message: those of a safetensors file of them."""
    factors = {}
    for name, (rows, columns) in shapes.items():
        factors |= {f"{name}/left": torch.zeros(rows, rank), f"{name}/right": torch.zeros(rank, columns)}
        factors[f"{name}/decay"] = torch.zeros((), dtype=torch.float64)
    return len(save(factors))


def test_every_site_takes_part_in_every_round_and_is_evaluated(federation: Path) -> None:
    records = metrics(federation)
    trained = {(r["round"], r["client"]) for r in records if r["phase"] == "train"}
    assert trained == {(n, site) for n in (1, 2) for site in SIZES}
    evaluated = {(r["round"], r["client"]) for r in records if r["phase"] == "evaluate"}
    assert evaluated == {(n, who) for n in (0, 1, 2) for who in (*SIZES, "server")}
    expected = {"loss", "perplexity", "tokens", "examples", "generated", "rouge_l", "bleu_4", "exact_match"}
    assert all(set(r["evaluate"]) == expected for r in records if r["phase"] == "evaluate")  # type: ignore[call-overload]


def test_training_lowers_the_held_out_loss_everywhere(federation: Path) -> None:
    loss = {(r["round"], r["client"]): r["evaluate"]["loss"] for r in metrics(federation) if r["phase"] == "evaluate"}  # type: ignore[index]
    for who in (*SIZES, "server"):
        assert loss[2, who] < loss[0, who]


def test_disk_keeps_no_message_and_nothing_for_other_accounts(federation: Path) -> None:
    run = federation.parent / "runs" / "tiny"
    sent = [t for file in run.glob("checkpoints/*/steps.safetensors") for t in load_file(file).values()]
    parts = [part for t in sent if len(part := t.numpy().tobytes()[:64]) == 64]
    assert len(parts) > len(SIZES)
    flower = b"".join(file.read_bytes() for file in (run / "flwr").rglob("*") if file.is_file())
    assert len(flower) > 100_000
    assert not any(part in flower for part in parts)
    wide = {str(file): oct(mode) for file in (run, *run.rglob("*")) if (mode := file.lstat().st_mode) & 0o077}
    assert wide == {}


def test_result_loads_and_answers(federation: Path) -> None:
    folder = federation.parent / "runs" / "tiny" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("acute pain", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3


def test_run_folder_holds_all_results(federation: Path) -> None:
    folder = federation.parent / "runs" / "tiny"
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "completed"
    assert len(json.loads((folder / "samples.json").read_text())) == 2
    assert list((folder / "tensorboard").iterdir())
    assert "<html" in (folder / "report.html").read_text()
    assert load(folder / "federation.yaml", FederationConfig) == resolved(
        load(federation, FederationConfig), federation
    )


def test_no_private_row_is_written_down(federation: Path) -> None:
    """No shard's text appears in anything but the shard; the server's own set may, it is the operator's."""
    private = [
        json.loads(line)["title"] for s in SIZES for line in (federation.parent / f"{s}.jsonl").read_text().splitlines()
    ]
    for file in (federation.parent / "runs").rglob("*"):
        if file.is_file() and file.suffix not in (".safetensors", ".py"):
            content = file.read_bytes()
            assert not [row for row in private if f"{row}\n".encode() in content or f'"{row}"'.encode() in content], (
                file
            )


def test_no_process_survives(federation: Path) -> None:
    assert survivors(federation) == []


def test_second_run_into_the_same_folder_is_refused_and_loses_nothing(federation: Path) -> None:
    before = (federation.parent / "runs" / "tiny" / "run.json").read_text()
    done = launch(federation)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert "Traceback" not in done.stderr
    assert (federation.parent / "runs" / "tiny" / "run.json").read_text() == before
