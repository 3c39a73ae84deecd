"""What the round loop does with updates that are wrong, late, or not there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from common.errors import FederationError
from common.protocol import wire
from deploy.cli import main
from server.loop.checkpoint import newest
from server.run.folder import read_lines
from strategies.admission.bounds import change_norms
from strategies.rule import Update
from tests.harness.fake_sites import LORA, NAME, LoraSite, Site, factors, run

Tamper = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
LEFT, DECAY = f"{NAME}/left", f"{NAME}/decay"


class Faulty(Site):
    """A site whose updates of some rounds are not what they should be."""

    def __init__(self, number: int, rounds: range, tamper: Tamper, about: int = 0) -> None:
        super().__init__(number)
        self._rounds, self._tamper, self._about = rounds, tamper, about

    def reply(self, message: Message) -> Message:
        reply = super().reply(message)
        config: Any = message.content["config"]
        if message.metadata.message_type != MessageType.TRAIN or config["server-round"] not in self._rounds:
            return reply
        arrays, told = reply.content["arrays"], reply.content["config"]
        assert isinstance(arrays, ArrayRecord)
        assert isinstance(told, ConfigRecord)
        content = {**reply.content, "arrays": wire.encode(self._tamper(wire.decode(arrays)))}
        content["config"] = ConfigRecord({**told, "server-round": config["server-round"] - self._about})
        return Message(RecordDict(content), reply_to=message)


def scaled(factor: float) -> Tamper:
    return lambda tensors: {name: t * factor if name == LEFT else t for name, t in tensors.items()}


def events(tmp_path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] in kinds]


def cohort(needed: int, **more: object) -> dict[str, Any]:
    return {"min_clients": needed, "round_deadline": 30.0, **more}


BAD = {
    "not a number": (scaled(float("nan")), r"site-4: .*up.weight: \d+ non-finite values in its factors"),
    "beyond what training can do": (
        scaled(1e6),
        r"site-4: .*up.weight moved by .*; allowed: .* a round's steps can do",
    ),
    "beyond the cohort": (scaled(12.0), r"site-4: its update moved by .*; allowed: .*, 5 times the round's median"),
    "a factor is missing": (lambda t: {n: v for n, v in t.items() if n != LEFT}, r"site-4: .*/left' is missing"),
    "wrong shape": (lambda t: {n: v[1:] if n == LEFT else v for n, v in t.items()}, "site-4: .* do not fit a weight"),
    "wrong type": (lambda t: {n: v.double() if n == LEFT else v for n, v in t.items()}, "site-4: .* is torch.float64"),
    "a decay whose square overflows": (
        lambda t: {n: torch.tensor(1e200, dtype=torch.float64) if n == DECAY else v for n, v in t.items()},
        r"site-4: .*up.weight moved by (inf|nan); allowed",
    ),
    "a factor whose square overflows": (scaled(1e30), r"site-4: .* a norm of .* in its factors; allowed: up to 1e\+12"),
    "another tensor": (lambda t: {**t, "other": torch.zeros(2)}, r"site-4: tensor 'other' was not to come; allowed: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_update_is_refused_by_name_and_the_round_goes_on_without_it(tmp_path: Path, kind: str) -> None:
    tamper, reason = BAD[kind]
    sites = [Site(1), Site(2), Site(3), Faulty(4, range(1, 2), tamper)]
    settings = {
        "cohort": cohort(3),
        "admission": {"norm_ratio": 5.0},
        "training": {"learning_rate": 700.0, "local_steps": 1},
    }
    final = run(tmp_path, sites, 1, **settings)
    (refused,) = events(tmp_path, "update_refused", "client_failed")
    assert refused["client"] == "site-4"
    assert re.search(reason, refused["reason"])
    overflowed = kind in ("not a number", "a factor whose square overflows")
    assert refused["kind"] == ("DivergedUpdate" if overflowed else "RefusedUpdate")
    without = run(tmp_path / "without", [Site(1), Site(2), Site(3)], 1, **settings)
    assert torch.equal(final[NAME], without[NAME])
    trained = [r["client"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["phase"] == "train"]
    assert sorted(trained) == ["site-1", "site-2", "site-3"]


def test_decay_whose_square_overflows_is_refused_where_nothing_limits_a_step(tmp_path: Path) -> None:
    training = {"learning_rate": 1.0, "local_steps": 1, "optimizer": "sgd", "max_grad_norm": None}
    tamper, _ = BAD["a decay whose square overflows"]
    settings = {"cohort": cohort(1), "admission": {"norm_ratio": None}, "training": training}
    run(tmp_path, [Site(1), Faulty(2, range(1, 2), tamper)], 1, **settings)
    (refused,) = events(tmp_path, "update_refused")
    assert re.search(r"site-2: .*up.weight moved by (inf|nan); allowed: a finite number", refused["reason"])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (Array("float64", (), "numpy.ndarray", b"PK\x03\x04" + b"\0" * 60), "site-3: .*/decay: not a .npy array"),
        (Array("bfloat16", (-1, -6), wire.BF16, b"\0" * 12), r"site-3: .*/decay: 12 bytes do not make a bfloat16"),
        (Array("uint8", (9,), wire.BUNDLE, b"\1" * 9), r"site-3: '.*/decay': a bundle's header of \d+ bytes; allowed"),
    ],
)
def test_bytes_that_are_no_tensor_are_refused_and_the_round_goes_on(tmp_path: Path, array: Array, reason: str) -> None:
    class Garbled(Site):
        def reply(self, message: Message) -> Message:
            reply = super().reply(message)
            if message.metadata.message_type == MessageType.TRAIN:
                reply.content["arrays"] = ArrayRecord({**reply.content.array_records["arrays"], DECAY: array})
            return reply

    run(tmp_path, [Site(1), Site(2), Garbled(3)], 1, cohort=cohort(2))
    (refused,) = events(tmp_path, "update_refused")
    assert re.search(reason, refused["reason"])


def test_error_that_nobody_foresaw_costs_one_site_the_round_and_its_text_stays_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(update: Update, base: dict[str, torch.Tensor]) -> dict[str, float]:
        if update.client == "site-3":
            raise ZeroDivisionError("something of the site's")
        return change_norms(update, base)

    monkeypatch.setattr("server.loop.round.change_norms", failing)
    run(tmp_path, [Site(1), Site(2), Site(3)], 2, cohort=cohort(2))
    reasons = [e["reason"] for e in events(tmp_path, "update_refused")]
    assert reasons == ["site-3: its reply cannot be used (ZeroDivisionError; the server's log says where)"] * 2
    (record, _) = [r for r in caplog.records if r.name == "server.loop.round"]
    assert record.getMessage() == "round 1: reading the reply of site-3 failed"
    assert record.exc_info is not None


@pytest.mark.parametrize("strategy", ["flexlora", "fedit"])
@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (LoraSite(3, lora_alpha=8.0), "site-3: lora-alpha is 8.0; the federation's is 16.0"),
        (LoraSite(3, lora_alpha=5e-324), "site-3: lora-alpha is 5e-324; the federation's is 16.0"),
        (LoraSite(3, lora_alpha=1e300), "site-3: lora-alpha is 1e\\+300; allowed: a positive number"),
        (LoraSite(3, lora_alpha=float("nan")), "site-3: lora-alpha is nan; allowed: a positive number"),
        (LoraSite(3, ranks=(2, 4)), "site-3: .*0.q_proj.lora_A.weight has (rank 2, others 4|shape)"),
        (LoraSite(3, ranks=(4, 3)), "site-3: .*1.q_proj.lora_A.weight has (rank 3, others 4|shape)"),
        (LoraSite(3), None),
        (LoraSite(3, lora_alpha=16.0), None),
    ],
)
def test_lora_alpha_and_rank_of_a_site_are_the_federations(
    tmp_path: Path, strategy: str, site: LoraSite, reason: str | None
) -> None:
    """A site that does not tell its alpha has the federation's."""
    sites = [LoraSite(1, lora_alpha=16.0), LoraSite(2, lora_alpha=16.0), site]
    config, training = {**LORA, "name": strategy}, {"learning_rate": 10.0, "local_steps": 1}
    run(tmp_path, sites, 2, cohort=cohort(2), strategy=config, training=training, start=factors(4, 4))
    reasons = [e["reason"] for e in events(tmp_path, "update_refused", "client_failed")]
    assert len(reasons) == (0 if reason is None else 2)
    assert all(re.search(str(reason), told) for told in reasons)


def test_update_of_another_round_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [Site(1), Site(2), Faulty(3, range(2, 3), lambda t: t, about=1)], 3, cohort=cohort(2))
    (refused,) = events(tmp_path, "update_refused")
    assert refused["reason"] == "site-3: the update is of round 1, this is round 2"


def test_round_without_enough_valid_updates_fails_with_all_reasons(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"round 1: 1 valid updates, 2 needed; site-2: .* non-finite values"):
        run(tmp_path, [Site(1), Faulty(2, range(1, 9), scaled(float("inf")))], 2)


def test_site_refused_three_times_in_a_row_is_left_out_until_readmitted(tmp_path: Path) -> None:
    bad = Faulty(3, range(2, 5), scaled(float("nan")))
    good = Site(1)

    def readmit_in_round_6(message: Message) -> None:
        if message.metadata.message_type == MessageType.TRAIN and good.sent[-1][0] == 6:
            assert main(["readmit", "run", "site-3", "--runs", str(tmp_path)]) == 0

    good.before_reply = readmit_in_round_6  # type: ignore[assignment]
    run(tmp_path, [good, Site(2), bad], 8, cohort=cohort(2))
    assert [e["round"] for e in events(tmp_path, "update_refused")] == [2, 3, 4]
    (excluded,) = events(tmp_path, "client_excluded")
    assert excluded["reason"] == (
        "site-3: left out after 3 refused updates or errors in a row; to readmit it: "
        f"fedspan readmit run site-3 --runs {tmp_path}"
    )
    assert [e["client"] for e in events(tmp_path, "client_readmitted")] == ["site-3"]
    asked = {e["round"]: "site-3" in e["clients"] for e in events(tmp_path, "round_started")}
    assert asked == {1: True, 2: True, 3: True, 4: True, 5: False, 6: False, 7: True, 8: True}
    assert bad.sent[-1][0] == 8


def test_refusals_that_are_not_in_a_row_leave_nobody_out(tmp_path: Path) -> None:
    class EveryOther(Faulty):
        def reply(self, message: Message) -> Message:
            self._rounds = range(1, 10, 2)
            return super().reply(message)

    run(tmp_path, [Site(1), Site(2), EveryOther(3, range(0), scaled(float("nan")))], 8, cohort=cohort(2))
    assert len(events(tmp_path, "update_refused")) == 4
    assert events(tmp_path, "client_excluded") == []


def test_who_is_left_out_stays_so_when_the_run_is_resumed(tmp_path: Path) -> None:
    settings = {"cohort": cohort(2), "admission": {"max_refusals": 2}}
    bad = scaled(float("nan"))

    def fail(message: Message) -> Message:
        raise ConnectionError("the server is gone")

    two = Site(2)
    two.before_reply = lambda message: fail(message) if two.sent[-1][0] == 4 else None
    with pytest.raises(ConnectionError):
        run(tmp_path, [Site(1), two, Faulty(3, range(1, 9), bad)], 5, **settings)
    saved = newest(tmp_path / "run", pytest.fail)
    assert saved is not None
    assert saved.refusals == {"site-3": 2}
    run(tmp_path, [Site(1), Site(2), Site(3)], 5, resume=True, **settings)
    asked = [e["clients"] for e in events(tmp_path, "round_started")]
    assert asked[:2] == [["site-1", "site-2", "site-3"]] * 2
    assert asked[2:] == [["site-1", "site-2"]] * (len(asked) - 2)


@pytest.mark.parametrize("arguments", [["run", "../x"], ["run/nothing", "site-1"]])
def test_readmitting_names_what_is_wrong(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [Site(1)], 1)
    assert main(["readmit", *arguments, "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "run" / "readmit").exists()


DECLARED = {"clip": 100.0, "noise": 100.0, "delta": 1e-5, "max_epsilon": 8.0}
