"""The life of a federation of processes: it is begun, watched, stopped, taken up again, and ends as if in one go.

SuperLink, SuperNodes, workers and the run are processes of their own, with gRPC on loopback between them.
"""

import json
import signal
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.system.processes import free_ports
from deploy.sandbox.tiny import make_federation
from server.run.folder import check_resumable
from server.run.state import RunState, read_state
from tests.harness.command import fedspan
from tests.harness.in_one_process import in_one_process
from tests.harness.processes import FEDSPAN, Federation, environment, survivors
from tests.harness.results import events, payload, records, same_bits, trainings
from tests.server.operate.test_metrics import Samples, scrape

SIZES = {"site-a": 9, "site-b": 17}
ROUNDS = 3

pytestmark = pytest.mark.timeout(1200)


@dataclass
class Life:
    """A federation that was stopped in the middle and has run to its end, and what was seen on the way.

    Attributes:
        seen: what `fedspan status` tells while it runs; ``metrics``: what Prometheus reads then;
        listed: the run as Flower's own command shows it then.
        stopped: what `fedspan stop` says; ``code``: of the launcher that was stopped; ``left``: its processes.
        interrupted: the run after that; ``log``: all that its launcher has said.
        changed: code and words of `fedspan run --resume` with another federation file.
        resumed: code and words of the launcher that has brought it to its end.
    """

    file: Path
    run: Path
    seen: dict[str, Any]
    metrics: Samples
    listed: dict[str, Any]
    stopped: tuple[int, str]
    code: int
    left: list[str]
    interrupted: RunState
    log: str
    changed: tuple[int, str]
    resumed: tuple[int, str]

    @property
    def after(self) -> int:
        """The round after which it was taken up again."""
        (event,) = events(self.run, "resumed")
        return int(event["round"])


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp("life")
    file = make_federation(folder, SIZES, strategy={"rank": 2}, rounds=ROUNDS, cohort={"round_deadline": 900.0})
    (port,) = free_ports(1)
    found: dict[str, Any] = {}
    with Federation(file, "tiny", "--metrics-port", str(port), env={"FEDSPAN_LOG": "json"}) as federation:
        run = federation.run
        federation.wait_event("round_finished", round=1)
        (worker,) = federation.worker_process("site-b")
        worker.send_signal(signal.SIGSTOP)  # so that it does not end while it is looked at
        code, seen = fedspan("status", "tiny", "--runs", run.parent, "--json")
        assert code == 0, seen
        found["seen"] = json.loads(seen)
        found["metrics"], found["listed"] = scrape(port), flower_lists(run, found["seen"]["flower_run"])
        found["stopped"] = fedspan("stop", "tiny", "--runs", run.parent, "--deadline", 300)
        found["code"], found["left"], found["log"] = federation.process.wait(60), survivors(file), federation.log
    check_resumable(run, resolved(load(file, FederationConfig), file))
    found["interrupted"] = read_state(run)
    told = file.read_text()
    config = yaml.safe_load(told)
    file.write_text(yaml.safe_dump({**config, "training": {**config["training"], "learning_rate": 0.5}}))
    found["changed"] = fedspan("run", file, "--runs", run.parent, "--resume")
    file.write_text(told)
    with Federation(file, "tiny", "--resume") as federation:
        found["resumed"] = federation.wait(), federation.log.removeprefix(found["log"])
    return Life(file=file, run=run, **found)


def flower_lists(run: Path, number: str) -> dict[str, Any]:
    """A run as Flower's own command shows it."""
    asked = ["flower", "--runs", str(run.parent), run.name, "list", "local", "--run-id", number, "--format", "json"]
    done = subprocess.run(
        [*FEDSPAN, *asked], env=environment(), capture_output=True, text=True, timeout=300, check=True
    )
    (listed,) = json.loads(done.stdout[done.stdout.index("{") :])["runs"]
    return dict(listed)


@cache
def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_run_is_seen_scraped_and_listed_while_it_lives(life: Life) -> None:
    assert life.seen["state"] == "running"
    sites = {s["site"]: (s["connection"], s["device"], s["rounds"] > 0) for s in life.seen["sites"]}
    assert sites == dict.fromkeys(SIZES, ("up", "cpu", True))
    samples = {name: value for (name, _), value in life.metrics.items()}
    assert samples["fedspan_rounds"] == ROUNDS
    assert samples["fedspan_round"] >= life.seen["round"]
    assert samples["fedspan_sites_connected"] == len(SIZES)
    assert life.listed["status"] == "running"


def test_run_that_is_stopped_leaves_no_process_and_says_how_it_goes_on(life: Life) -> None:
    code, said = life.stopped
    assert (code, life.code) == (0, 130)
    assert "tiny is stopped after round" in said
    assert life.left == []
    assert life.interrupted.state == "interrupted"
    assert str(life.interrupted.to_go_on).endswith("--resume")


def test_logs_are_json_where_that_is_asked_for(life: Life) -> None:
    lines = [json.loads(line) for line in life.log.splitlines()]
    assert {(line["component"], line["run"]) for line in lines} == {("supervisor", "tiny")}
    assert {"client_joined", "round_finished"} <= {line.get("event") for line in lines}
    log = (life.run / "logs" / "site-a-worker.log").read_text()
    worker = [json.loads(line) for line in log[: log.rindex("$ ")].splitlines() if line[:1] != "$"]
    assert {"site-a"} == {site for line in worker if (site := line.get("site"))}


def test_run_does_not_go_on_with_another_federation_file(life: Life) -> None:
    code, said = life.changed
    assert code == 2
    assert "the federation file has changed since the run began: `training.learning_rate` was 0.01, is 0.5" in said


def test_run_is_taken_up_after_its_last_round_and_ends(life: Life) -> None:
    code, said = life.resumed
    assert code == 0, said
    assert f"resumed after round {life.after}" in said
    assert life.after >= 1
    assert survivors(life.file) == []


def test_result_is_that_of_one_process_to_the_last_bit(life: Life) -> None:
    same_bits(life.run, in_one_process(life.file))


def test_frozen_tensors_are_byte_identical_and_never_travel(life: Life) -> None:
    base, exported = final(life.file.parent / "model"), final(life.run / "model")
    trained = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")}
    assert base.keys() == exported.keys()
    assert {name for name in base if not torch.equal(base[name], exported[name])} == trained
    # Three steps with a refresh every second: two bases of rank 2, so that factors are the smaller form, also of both
    # sites together. Every site has the base model, from which round 1 starts, and holds the version that it was sent
    # last; but its processes are new in the first round after the stop.
    up, down = (factors({name: base[name].shape for name in trained}, rank) for rank in (4, 8))
    for record in records(life.run, "train"):
        number = record["round"]
        steps = number - 1 if number == life.after + 1 else min(number - 1, 1)
        assert record["bytes"] == {"down": steps * down, "up": up}


def factors(shapes: dict[str, torch.Size], rank: int) -> int:
    """Bytes of small weights' factors in a message."""
    parts: dict[str, list[int]] = {}
    for name, (rows, columns) in shapes.items():
        parts |= {f"{name}/left": [rows, rank], f"{name}/right": [rank, columns], f"{name}/decay": []}
    return payload(parts, **{f"{name}/decay": torch.float64 for name in shapes})


def test_every_site_takes_part_in_every_round_once_and_is_evaluated(life: Life) -> None:
    assert trainings(life.run) == [(n, site) for n in range(1, ROUNDS + 1) for site in SIZES]
    evaluated = records(life.run, "evaluate")
    found = sorted((r["round"], r["client"]) for r in evaluated)
    assert found == sorted((n, who) for n in range(ROUNDS + 1) for who in (*SIZES, "server"))
    assert all(set(r["evaluate"]) == {"loss", "perplexity", "tokens", "examples"} for r in evaluated)


def test_training_lowers_the_held_out_loss_everywhere(life: Life) -> None:
    loss = {(r["round"], r["client"]): r["evaluate"]["loss"] for r in records(life.run, "evaluate")}
    for who in (*SIZES, "server"):
        assert loss[ROUNDS, who] < loss[0, who]


def test_disk_keeps_no_message_and_nothing_for_other_accounts(life: Life) -> None:
    sent = [t for file in life.run.glob("checkpoints/*/steps.safetensors") for t in load_file(file).values()]
    parts = [part for t in sent if len(part := t.numpy().tobytes()[:64]) == 64]
    assert len(parts) > len(SIZES)
    flower = b"".join(file.read_bytes() for file in (life.run / "flwr").rglob("*") if file.is_file())
    assert len(flower) > 100_000
    assert not any(part in flower for part in parts)
    wide = {str(file): oct(mode) for file in (life.run, *life.run.rglob("*")) if (mode := file.lstat().st_mode) & 0o077}
    assert wide == {}


def test_result_loads_and_answers(life: Life) -> None:
    folder = life.run / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("acute pain", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3


def test_run_folder_holds_all_results(life: Life) -> None:
    assert json.loads((life.run / "run.json").read_text())["status"] == "completed"
    assert len(json.loads((life.run / "samples.json").read_text())) == 2
    assert list((life.run / "tensorboard").iterdir())
    assert "<html" in (life.run / "report.html").read_text()
    kept = load(life.run / "federation.yaml", FederationConfig)
    assert kept == resolved(load(life.file, FederationConfig), life.file)


def test_no_private_row_is_written_down(life: Life) -> None:
    """No shard's text appears in anything but the shard; the server's own set may, it is the operator's."""
    shards = [(life.file.parent / f"{site}.jsonl").read_text().splitlines() for site in SIZES]
    private = [json.loads(line)["title"] for shard in shards for line in shard]
    assert len(private) == sum(SIZES.values())
    for file in life.run.rglob("*"):
        if file.is_file() and file.suffix not in (".safetensors", ".py"):
            content = file.read_bytes()
            told = [row for row in private if f"{row}\n".encode() in content or f'"{row}"'.encode() in content]
            assert told == [], file


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "already holds a run"), (["--resume"], "the run has ended well, nothing is left to do")],
)
def test_run_that_has_ended_is_not_begun_again_and_loses_nothing(life: Life, options: list[str], says: str) -> None:
    before = (life.run / "run.json").read_text()
    code, said = fedspan("run", life.file, "--runs", life.run.parent, *options)
    assert code == 2
    assert says in said
    assert (life.run / "run.json").read_text() == before


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path) -> None:
    code, said = fedspan("run", make_federation(tmp_path, SIZES), "--runs", tmp_path / "runs", "--resume")
    assert code == 2
    assert "holds no run that could go on; leave out --resume" in said
