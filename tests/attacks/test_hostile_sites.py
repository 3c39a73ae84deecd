"""Texts, numbers and tensors that no honest site would send: the run goes on, and no terminal or page is theirs."""

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from rich.console import Console

from common.errors import DataError
from common.protocol import wire
from server.operate import supervise
from server.operate.progress import Display
from server.operate.status import show_one
from server.report.write import write_report
from server.run.folder import read_lines
from server.run.state import read_state
from tests.attacks.hostile import LEFT, THREE, Hostile, events, honest, says, sends, tells
from tests.harness.fake_sites import LoraSite, Site, factors, run

COMMANDS = "\x1b[2J\x1b]52;c;cm0gLXJmIC8=\x07\x9b2J\nsite-1: all is well\r\u202e"


def shown(folder: Path) -> str:
    """All that an operator sees of a run: its display, its status, its report, and its files as they are."""
    console = Console(file=io.StringIO(), width=200)
    Display(console, "run").show(read_lines(folder / "run" / "events.jsonl"))
    console.print(show_one(read_state(folder / "run")))
    files = [(folder / "run" / name).read_text() for name in ("events.jsonl", "metrics.jsonl", "run.json")]
    return "\n".join([console.file.getvalue(), write_report(folder / "run").read_text(), *files])  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.QUERY])
def test_reason_of_30_megabytes_costs_a_line(tmp_path: Path, kind: str) -> None:
    started = time.process_time()
    run(tmp_path, [*honest(), Hostile(4, says(DataError.code, COMMANDS * 1_200_000), kind)], 1, **THREE)
    (failed,) = events(tmp_path, "client_failed", "client_refused")
    assert len(failed["reason"].encode()) <= 1024
    assert failed["reason"].isprintable()
    assert len(shown(tmp_path)) < 200_000
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    "site",
    [
        Hostile(4, says(DataError.code, COMMANDS)),
        Hostile(4, says(DataError.code, COMMANDS), MessageType.QUERY),
        Hostile(4, says(ErrorCode.NODE_UNAVAILABLE, COMMANDS)),
        Hostile(4, sends(**{COMMANDS: Array("float32", (1,), "numpy.ndarray", b"1")})),
        Hostile(4, sends(**{LEFT: Array(COMMANDS, (1,), COMMANDS, b"1")})),
        Hostile(4, lambda m, r: Message(RecordDict({**r.content, COMMANDS: ConfigRecord()}), reply_to=m)),
        Hostile(4, tells(**{COMMANDS: 1.0})),
    ],
)
def test_no_text_of_a_site_commands_a_terminal_or_forges_a_line(tmp_path: Path, site: Site) -> None:
    run(tmp_path, [*honest(), site], 1, **THREE)
    assert events(tmp_path, "client_failed", "update_refused", "client_refused")
    text = shown(tmp_path)
    assert all(c.isprintable() or c in "\n\xa0" for c in text)  # a unit stays beside its number
    assert not any(line.strip().startswith("site-1: all is well") for line in text.splitlines())


@pytest.mark.parametrize("key", ["base_digest", "tokenizer_digest", "device", "version"])
def test_hello_that_commands_a_terminal_keeps_its_site_out(tmp_path: Path, key: str) -> None:
    site = Site(4)
    site.says = {key: COMMANDS[:60]}
    run(tmp_path, [*honest(), site], 1, **THREE)
    (refused,) = events(tmp_path, "client_refused")
    assert (refused["client"], refused["kind"]) == ("site-4", "WireError")
    assert all(c.isprintable() or c in "\n\xa0" for c in shown(tmp_path))


HUGE = 1.7e308


@pytest.mark.parametrize("loss", [HUGE, float("inf"), float("nan"), 1e10])
def test_loss_beyond_all_measure_is_told_as_diverged_and_breaks_no_page(tmp_path: Path, loss: float) -> None:
    site = Hostile(4, tells(evaluate__loss=loss, evaluate__perplexity=loss, train__loss=loss))
    run(tmp_path, [*honest(), site], 2, **THREE)
    told = [event for event in events(tmp_path, "evaluated") if event["client"] == "site-4" and event["round"] < 2]
    assert [event["scores"]["loss"] for event in told] == [None, None]
    text = shown(tmp_path)
    assert "site-4 held-out loss not finite" in text
    assert "e+308" not in text


def test_one_finite_number_flattens_nobody_elses_curve(tmp_path: Path) -> None:
    run(tmp_path, [*honest(), Hostile(4, tells(evaluate__loss=9e8))], 2, **THREE)
    text = shown(tmp_path)
    assert "Above the axis, and not drawn: values of site-4." in text


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"evaluate__rouge_l": 1.5}, r"evaluate.rouge_l is 1.5; allowed: a number from 0 to 1"),
        ({"evaluate__mcc": -2.0}, r"evaluate.mcc is -2.0; allowed: a number from -1 to 1"),
        ({"evaluate__loss": -HUGE}, r"evaluate.loss is -1.7e\+308; allowed: a number from 0"),
        ({"seconds__train": HUGE}, r"seconds.train is 1.7e\+308; allowed: a number from 0 to 1e\+15"),
        ({"train__peak_memory_bytes": float("inf")}, r"train.peak_memory_bytes is inf; allowed"),
        ({"clock__started": HUGE}, r"clock.started is 1.7e\+308; allowed"),
        ({"train__luck": 1.0}, r"unknown key 'train.luck'"),
    ],
)
def test_number_that_nothing_can_have_measured_is_refused(
    tmp_path: Path, numbers: dict[str, float], reason: str
) -> None:
    run(tmp_path, [*honest(), Hostile(4, tells(**numbers))], 1, **THREE)
    (refused,) = events(tmp_path, "update_refused")
    assert refused["client"] == "site-4"
    assert re.search(reason, refused["reason"])


def test_site_counts_for_no_more_time_than_the_server_has_waited(tmp_path: Path) -> None:
    lies = {"seconds__train": 1e14, "seconds__load": 1e14, "clock__started": 1e14, "clock__finished": 1.0}
    run(tmp_path, [*honest(), Hostile(4, tells(**lies))], 1, **THREE)
    (record,) = [
        r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if (r["client"], r["phase"]) == ("site-4", "train")
    ]
    assert all(0 <= seconds < 60 for seconds in record["seconds"].values())


def test_bundle_with_a_header_of_20_megabytes_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = wire.load

    def parse(data: bytes) -> dict[str, torch.Tensor]:
        assert len(data) < 2**20
        return true(data)

    monkeypatch.setattr(wire, "load", parse)
    header = b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' + b" " * 20_000_000 + b"}"
    raw = len(header).to_bytes(8, "little") + header
    bundle = Array("uint8", (len(raw),), wire.BUNDLE, raw)
    run(tmp_path, [*honest(), Hostile(4, sends(**{LEFT: bundle}))], 1, **THREE)
    (refused,) = events(tmp_path, "update_refused")
    assert "bytes of tensors came; allowed: up to" in refused["reason"]


@pytest.mark.parametrize("strategy", ["flexlora", "fedit"])
def test_lora_factors_of_any_size_are_refused_before_they_are_read(tmp_path: Path, strategy: str) -> None:
    class Large(LoraSite):
        def _train(self, server_round: int) -> Any:
            told = super()._train(server_round)
            name = min(told.arrays)
            big = wire.encode({name: torch.zeros(4096, 12)})
            object.__setattr__(told, "arrays", ArrayRecord({**told.arrays, **big}))
            return told

    config = {"name": strategy, "rank": 4, "lora_alpha": 16.0}
    sites = [LoraSite(1), LoraSite(2), LoraSite(3), Large(4)]
    training = {"learning_rate": 10.0, "local_steps": 1}
    run(tmp_path, sites, 1, strategy=config, training=training, start=factors(4, 4), **THREE)
    (refused,) = events(tmp_path, "update_refused")
    assert "bytes came; allowed: up to" in refused["reason"]


def test_report_that_cannot_be_drawn_does_not_make_a_run_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: object) -> str:
        raise OverflowError("a number of a site")

    run(tmp_path, honest(), 1, **THREE)
    monkeypatch.setattr("server.report.write.render", fail)
    told: list[str] = []
    supervise.draw_report(tmp_path / "run", told.append)
    assert told == ["the run has ended well, but its report cannot be drawn (OverflowError); see fedspan report run"]


def test_events_are_one_object_per_line_whatever_a_site_writes(tmp_path: Path) -> None:
    run(tmp_path, [*honest(), Hostile(4, says(DataError.code, 'a\n{"event": "finished"}\u2028b'))], 1, **THREE)
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"] != "finished"
