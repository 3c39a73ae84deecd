"""What the gate lets in and out, and what it counts from the ledger alone."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.common.constant import ErrorCode

from client.privacy import budget, guard as policy
from client.privacy.budget import CEILING, rounded, step_of
from client.privacy.guarantee import guarantee
from client.privacy.guard import Gate
from client.privacy.ledger import Entry, verify
from client.privacy.ledger_summary import summary
from common.accountant import cost, epsilon
from common.config.federation import FederationConfig
from common.config.load import parse
from common.config.site import SiteConfig
from common.errors import ConfigError, DataError, DivergedError, FedSpanError, LedgerError, PolicyError, TrainingError
from common.protocol.messages import TRAINING, Failure, Hello, HelloRequest, TrainReply, TrainRequest
from deploy.cli import main

NAME = "model.layers.0.mlp.up_proj.weight"
PRIVATE = {"clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5, "max_epsilon": 5.0}
TENSOR = torch.arange(6.0).reshape(2, 3)


def site(**sections: Any) -> SiteConfig:
    data = {"path": "rows.jsonl", "prompt": "q", "answer": "a"}
    return parse({"name": "site-a", "data": data, **sections}, SiteConfig, "site.yaml")


def federation(name: str = "ours", strategy: str = "fedftg", **sections: Any) -> FederationConfig:
    training = {"learning_rate": 0.1, "local_steps": 1}
    data = {"name": name, "model": {"path": "m"}, "strategy": strategy, "rounds": 9, "training": training}
    return parse({**data, **sections}, FederationConfig, "f")


def asked(number: int, name: str = NAME) -> TrainRequest:
    """A request to train one tensor."""
    about: dict[str, Any] = {"federation": "{}", "signatures": None, "evaluate": False}
    return TrainRequest(server_round=number, active=[name], arrays=ArrayRecord(), **about)


HELLO = HelloRequest(federation="{}", signatures=None)


class Site:
    """A site whose gate is new for every message, as if its process were."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.file, self.config = folder / "site.yaml", site(**sections)
        self.ledger = folder / "site-a-ledger.jsonl"

    def gate(self, message: str = "train", run: int = 1) -> Gate:
        policy._books.clear()
        return Gate(self.config, self.file, message, run)

    def train(
        self,
        number: int = 1,
        run: int = 1,
        name: str = "ours",
        tensor: torch.Tensor = TENSOR,
        strategy: str = "fedftg",
        aside: str | None = None,
    ) -> None:
        gate = self.gate(run=run)
        gate.check(federation(name, strategy), asked(number))
        gate.check_rows(12)
        gate.receive({NAME: tensor})
        gate.charge(tensor.nbytes, 0)
        gate.admit([(NAME, tensor)], ["num-examples"], 12, float(tensor.norm()), aside)

    def entries(self) -> list[Entry]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]


def test_request_within_the_policy_passes_and_is_on_record_before_it_leaves(tmp_path: Path) -> None:
    limits = {
        "federations": ["ours"],
        "strategies": ["fedftg"],
        "tensors": ["model.layers.*.mlp.*"],
        "min_examples": 12,
    }
    own = Site(tmp_path, policy={**limits, "max_update_norm": 100.0})
    own.train()
    begun, charged, sent = own.entries()
    assert begun["site"] == "site-a"
    assert (charged["event"], charged["bytes"], charged["evaluation"], charged["privacy"]) == (
        "charged",
        24,
        False,
        None,
    )
    assert (sent["event"], sent["charged"], sent["aside"]) == ("sent", charged["line"], None)
    assert (sent["federation"], sent["strategy"], sent["run"], sent["round"]) == ("ours", "fedftg", "1", 1)
    assert (sent["rows"], sent["told"], sent["privacy"], sent["bundle"]) == (12, ["num-examples"], None, "not known")
    dtype, shape, size, digest, norm = sent["out"]["tensors"][NAME]
    assert (dtype, shape, size, len(digest)) == ("float32", [2, 3], 24, 64)
    assert norm == pytest.approx(sent["update_norm"]) == pytest.approx(55**0.5)
    assert sent["in"]["bytes"] == sent["out"]["bytes"] == 24


def test_cell_of_an_experiment_counts_in_a_ledger_of_its_own(tmp_path: Path) -> None:
    own = Site(tmp_path, policy={"max_rounds": 1}, ledger="elsewhere/site-a.jsonl")
    for cell in ("first", "second"):
        (tmp_path / cell).mkdir()
        for reason in (None, "`max_rounds` is 1"):
            policy._books.clear()
            gate = Gate(own.config, own.file, "train", 1, ledgers=tmp_path / cell)
            with nullcontext() if reason is None else pytest.raises(PolicyError, match=reason):
                gate.check(federation(), asked(1))
                gate.charge(24, 0)
                gate.admit([(NAME, TENSOR)], [], 12, 1.0)
    assert [file.parent.name for file in sorted(tmp_path.rglob("*.jsonl"))] == ["first", "second"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"federations": ["theirs"]}, "`federations` allows theirs; this is ours"),
        ({"strategies": ["rolora", "fedit"]}, "`strategies` allows rolora, fedit; this is fedftg"),
        ({"tensors": ["*.self_attn.*"]}, rf"`tensors` allows \*.self_attn.\*; asked was {NAME}"),
        ({"min_examples": 13}, "`min_examples` is 13; it has fewer"),
        ({"min_rows_per_update": 9}, "`min_rows_per_update` is 9; a round here trains on fewer rows"),
        (
            {"max_upload_bytes_per_day": 23},
            "`max_upload_bytes_per_day` is 23; 0 are spent today, a round takes up to 24",
        ),
    ],
)
def test_what_the_policy_does_not_allow_is_refused(tmp_path: Path, limits: dict[str, object], reason: str) -> None:
    own = Site(tmp_path, policy=limits)
    with pytest.raises(PolicyError, match=reason):
        own.train()
    assert not own.ledger.exists() or own.entries() == []


def test_what_was_charged_stays_charged_whatever_comes_of_it(tmp_path: Path) -> None:
    own = Site(tmp_path, policy={"max_update_norm": 7.4, "max_rounds": 2}, privacy=None)
    with pytest.raises(PolicyError, match=r"`max_update_norm` is 7\.4; the update's norm is above it"):
        own.train()
    gate = own.gate()
    gate.check(federation(), asked(2))
    gate.charge(24, 0)  # and then the process dies
    assert [entry["event"] for entry in own.entries()] == ["begun", "charged", "charged"]
    with pytest.raises(PolicyError, match="`max_rounds` is 2; all of them are trained"):
        own.train(3)


def test_no_more_bytes_leave_than_were_charged(tmp_path: Path) -> None:
    gate = Site(tmp_path).gate()
    gate.check(federation(), asked(1))
    gate.charge(23, 0)
    with pytest.raises(PolicyError, match="24 bytes of tensors do not leave: 23 were charged"):
        gate.admit([(NAME, TENSOR)], [], 12, 1.0)


def test_ledger_of_a_version_that_charged_nothing_is_counted_by_what_left(tmp_path: Path) -> None:
    own = Site(tmp_path, policy={"max_rounds": 1, "max_upload_bytes_per_day": 60})
    gate = own.gate()
    gate.check(federation(), asked(1))
    old = {"event": "sent", **gate._about, "out": {"bytes": 40}, "privacy": None}
    with gate._ledger.opened():
        gate._append(old)
    with pytest.raises(PolicyError, match="`max_rounds` is 1"):
        own.train(2)
    with pytest.raises(PolicyError, match="`max_upload_bytes_per_day` is 60; 40 are spent today"):
        own.train(1, name="another")


def test_evaluations_are_counted_over_restarts_and_runs(tmp_path: Path) -> None:
    own = Site(tmp_path)
    planned = 9 + 1
    for number in range(3 * planned):
        message = "train" if number % 2 else "evaluate"
        gate = own.gate(message, run=number)
        gate.check(federation(), asked(1))
        assert gate.charge(24, 10)
    gate = own.gate()
    gate.check(federation(), asked(1))
    assert not gate.charge(24, 10)  # it trains, and keeps its scores
    with pytest.raises(PolicyError, match=f"`max_evaluations` is {3 * planned}; all of them are made"):
        own.gate("evaluate").check(federation(), asked(1))
    gate = own.gate("evaluate")
    gate._about["agreement"] = "another"
    gate.check(federation("another"), asked(1))
    assert gate.charge(0, 10)


def test_few_held_out_rows_are_not_scored_and_cost_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = Site(tmp_path)
    gate = own.gate("evaluate")
    gate.check(federation(), asked(1))
    assert not gate.charge(0, 9)
    assert own.entries() == []
    assert "no scores leave: of 9 held-out rows, `policy.min_held_out` is 10" in caplog.text


@pytest.mark.parametrize(("rows", "step"), [(1, 1.0), (3, 0.5), (10, 0.1), (64, 0.02), (100, 0.01), (176, 0.01)])
def test_scores_leave_as_multiples_of_what_so_many_rows_can_tell(rows: int, step: float) -> None:
    assert step_of(rows) == step >= 1 / rows
    told = rounded({"loss": 2.3456, "perplexity": 10.4395, "examples": float(rows), "tokens": 7.0}, None)
    assert told["loss"] / step == pytest.approx(round(told["loss"] / step))
    assert abs(told["loss"] - 2.3456) <= step / 2 + 1e-9
    assert math.log(told["perplexity"]) == pytest.approx(told["loss"])
    assert (told["examples"], told["tokens"]) == (rows, 7.0)


@pytest.mark.parametrize("loss", [1e30, math.inf, math.nan])
def test_loss_that_one_row_lifts_leaves_as_the_ceiling(loss: float) -> None:
    assert rounded({"loss": loss, "examples": 64.0}, None)["loss"] == CEILING


def test_scores_of_answers_are_rounded_by_their_own_rows() -> None:
    told = rounded({"loss": 2.3456, "rouge_l": 0.456, "accuracy": 0.984375, "examples": 64.0, "generated": 10.0}, None)
    assert (told["loss"], told["rouge_l"], told["accuracy"]) == (2.34, 0.5, 0.98)


def test_limits_are_counted_over_restarts_and_runs(tmp_path: Path) -> None:
    own = Site(tmp_path, policy={"max_rounds": 2, "max_rounds_per_day": 3})
    own.train(1)
    own.train(1, run=2)
    for number, run in ((1, 1), (2, 2)):  # a round that is asked for again is one more update
        with pytest.raises(PolicyError, match="`max_rounds` is 2"):
            own.train(number, run=run)
    with pytest.raises(PolicyError, match="`max_rounds` is 2"):
        own.gate("hello", run=3).check(federation(), HELLO)
    own.train(1, name="another")
    with pytest.raises(PolicyError, match="`max_rounds_per_day` is 3"):
        own.train(2, name="another")
    own = Site(tmp_path, policy={"max_upload_bytes_per_day": 24 * 4 - 1})
    with pytest.raises(PolicyError, match="`max_upload_bytes_per_day` is 95; 72 are spent today"):
        own.train(1)


def test_a_new_day_brings_new_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Site(tmp_path, policy={"max_rounds_per_day": 1})
    own.train(1)
    with pytest.raises(PolicyError):
        own.train(2)
    monkeypatch.setattr(budget, "_today", lambda: "2999-01-01")
    own.train(2)


def test_patterns_speak_of_the_models_own_names_under_lora_too(tmp_path: Path) -> None:
    gate = Site(tmp_path, policy={"tensors": ["model.layers.?.mlp.*"]}).gate()
    gate.check(federation(strategy="rolora"), asked(1, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"))
    with pytest.raises(PolicyError):
        gate.check(
            federation(strategy="rolora"), asked(1, "base_model.model.model.layers.10.mlp.up_proj.lora_A.weight")
        )


def test_tensor_that_was_not_asked_for_does_not_leave(tmp_path: Path) -> None:
    gate = Site(tmp_path).gate()
    gate.check(federation(), asked(1))
    gate.charge(48, 0)
    with pytest.raises(PolicyError, match=r"score\.weight was not asked for"):
        gate.admit([(f"{NAME}/left", TENSOR), ("score.weight", TENSOR)], [], 12, 1.0)
    with pytest.raises(DivergedError, match="not finite"):
        gate.admit([(NAME, TENSOR)], [], 12, float("nan"))


ALWAYS = {"steps", "learning_rate", "wire_error"}
REPLY = TrainReply(
    server_round=1,
    arrays=ArrayRecord(),
    num_examples=9,
    lora_alpha=16.0,
    training=dict.fromkeys(TRAINING, 1.0),
    scores={"loss": 1.0, "rouge_l": 1.0, "examples": 1.0, "generated": 1.0},
    seconds={"train": 1.0},
    clock={"started": 1.0, "finished": 2.0},
    version="v",
)
GREETING = Hello(
    site="site-a",
    train_rows=9,
    held_out_rows=3,
    device="cpu",
    rank=2,
    base_digest="b",
    tokenizer_digest="t",
    version="1",
)


def test_metrics_leave_unless_they_are_kept_back(tmp_path: Path) -> None:
    assert Site(tmp_path).gate().shared(REPLY) == REPLY
    assert Site(tmp_path).gate().shared(GREETING) == GREETING
    gate = Site(tmp_path, policy={"share_metrics": False}).gate()
    assert gate.shared(GREETING) == replace(GREETING, held_out_rows=0)
    kept_back = gate.shared(REPLY)
    losses = {name for name in TRAINING if "loss" in name}
    assert kept_back == replace(REPLY, scores={}, training={n: 1.0 for n in TRAINING if n not in losses})
    gate = Site(tmp_path, privacy=PRIVATE).gate()
    private = gate.shared(REPLY)
    training, clock = dict.fromkeys(ALWAYS, 1.0), {"started": 1.0}
    assert private == replace(REPLY, training=training, scores={}, seconds={}, clock=clock)
    assert gate.shared(GREETING) == replace(GREETING, held_out_rows=0)


def test_budget_is_spent_before_anything_leaves_and_stops_the_site(tmp_path: Path) -> None:
    own = Site(tmp_path, privacy=PRIVATE)
    done = max(n for n in range(99) if epsilon(n * cost(4.0), 1e-5) <= 5.0)
    for number in range(1, done + 1):
        own.train(number)
    with pytest.raises(PolicyError, match=r"`max_epsilon` is 5; .* are spent, one more round would make it"):
        own.train(done + 1)
    mu_squared = [done * cost(4.0), (done + 1) * cost(4.0)]
    assert epsilon(mu_squared[0], 1e-5) <= 5.0 < epsilon(mu_squared[1], 1e-5)
    spent = [e["privacy"] for e in own.entries() if e["event"] == "sent"]
    assert spent[-1]["epsilon_total"] == pytest.approx(epsilon(mu_squared[0], 1e-5))
    assert spent[0]["epsilon_total"] == spent[0]["epsilon_round"] == pytest.approx(epsilon(cost(4.0), 1e-5))
    with pytest.raises(PolicyError, match="max_epsilon"):
        own.gate("hello", run=2).check(federation("another"), HELLO)


SHARED = {**PRIVATE, "noise": "shared", "colluders": 1}
MASKED: dict[str, Any] = {"strategy": "fedit", "cohort": {"min_clients": 12}, "secure_aggregation": {"threshold": 10}}


def test_shared_noise_is_refused_where_the_server_sees_single_updates(tmp_path: Path) -> None:
    for message in ("hello", "train"):
        with pytest.raises(PolicyError, match=r"`noise` shared needs a federation with `secure_aggregation\.noise`"):
            Site(tmp_path, privacy=SHARED).gate(message).check(federation(), HELLO)


def test_shared_noise_is_charged_by_what_the_sum_has_and_the_worst_is_counted_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "in_federation", lambda privacy, _: guarantee(privacy, 10, 1.5))
    own, mu_squared = Site(tmp_path, privacy=SHARED), cost(1.5 * 3 * (1 - 2**-18))  # 9 honest parts

    def charge() -> None:
        gate = own.gate()
        gate.check(federation(), asked(1))
        gate.charge(TENSOR.nbytes, 0)

    affordable = max(n for n in range(99) if epsilon(n * mu_squared, 1e-5) <= 5.0)
    for _ in range(affordable):
        charge()
    with pytest.raises(PolicyError, match="max_epsilon"):
        charge()
    spent = [e["privacy"] for e in own.entries() if e["event"] == "charged"][-1]
    assert (spent["noise"], spent["noise_multiplier"]) == ("shared", pytest.approx(4.5, rel=1e-5))
    assert spent["epsilon_total"] == pytest.approx(epsilon(affordable * mu_squared, 1e-5))
    assert spent["epsilon_worst"] == pytest.approx(epsilon(affordable * cost(1.5), 1e-5), rel=1e-4)


@pytest.mark.parametrize("privacy", [None, PRIVATE])
def test_where_updates_are_masked_no_other_tensor_leaves(tmp_path: Path, privacy: dict[str, Any] | None) -> None:
    gate = Site(tmp_path, privacy=privacy).gate()
    gate.check(federation(**MASKED), asked(1))
    gate.charge(TENSOR.nbytes, 0)
    with pytest.raises(PolicyError, match="with `secure_aggregation` only masked integers do"):
        gate.admit([(NAME, TENSOR)], [], 9, 1.0)
    gate.admit([(NAME, TENSOR.to(torch.int32))], [], 9, 1.0)


def test_summary_tells_against_whom_shared_noise_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "in_federation", lambda privacy, _: guarantee(privacy, 10, 1.5))
    gate = Site(tmp_path, privacy=SHARED).gate()
    gate.check(federation(**MASKED), asked(1))
    gate.charge(TENSOR.nbytes, 0)
    gate.admit([(NAME, TENSOR.to(torch.int32))], [], 9, 1.0)
    told = summary(tmp_path / "site-a-ledger.jsonl")
    assert f"epsilon {epsilon(cost(4.5), 1e-5):.4g} at delta 1e-05, of at most 5." in told
    assert "holds against the server and 1 other sites together" in told
    assert f"know all other noise: epsilon {epsilon(cost(1.5), 1e-5):.4g}." in told


def test_nothing_leaves_when_the_ledger_is_damaged_or_cannot_be_written(tmp_path: Path) -> None:
    own = Site(tmp_path)
    own.train()
    own.ledger.write_text(own.ledger.read_text().replace('"round":1', '"round":2'))
    with pytest.raises(LedgerError, match="line 2: it was changed"):
        own.train(2)
    error = TrainingError("x")
    told = own.gate().refuse(error, Failure.of(error))
    assert "line 2: it was changed" in told.reason  # the operator hears that, and nothing else
    assert told.code == LedgerError.code
    with pytest.raises(LedgerError, match="cannot be written"):
        Site(tmp_path / "no folder").train()


def test_errors_are_on_record_and_say_nothing_of_the_rows_with_privacy(tmp_path: Path) -> None:
    error = DivergedError("loss is nan in round 2, step 3")
    assert Site(tmp_path).gate().refuse(error, Failure.of(error)) == Failure(DivergedError.code, str(error))

    def charged(error: FedSpanError) -> Failure:
        gate = Site(tmp_path).gate()
        gate.check(federation(), asked(1))
        gate.charge(24, 0)
        return gate.refuse(error, Failure.of(error))

    overflowed = "the numbers of its training overflowed; lower training.learning_rate; the site's own log says more"
    assert charged(error) == Failure(DivergedError.code, overflowed)
    said = "its shard cannot be used; the site's own log says more"
    assert charged(DataError("rows.jsonl, row 7: column 'term' is empty")) == Failure(DataError.code, said)
    assert charged(PolicyError("no")) == Failure(PolicyError.code, "no")
    own = Site(tmp_path, privacy=PRIVATE)
    told = own.gate().refuse(error, Failure.of(error))
    assert told == Failure(FedSpanError.code, "this site could not do its part; the site's own log says more")
    assert told == own.gate().refuse(ValueError(), Failure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "at a line"))
    assert own.gate("hello").refuse(PolicyError("no"), Failure(7, "no")) == Failure(7, "site-a: no")
    assert [e["event"] for e in own.entries()] == [
        *("begun", "failed", "charged", "failed", "charged", "failed", "charged", "refused"),
        *("failed", "failed", "refused"),
    ]
    assert own.entries()[8]["reason"] == told.reason


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"policy": {"strategies": []}}, "`policy.strategies`"),
        ({"policy": {"federations": []}}, "`policy.federations`"),
        ({"policy": {"tensors": []}}, "`policy.tensors`"),
        ({"policy": {"strategies": ["fedfgt"]}}, "'fedfgt' is no strategy; allowed: fedftg, flexlora"),
        ({"policy": {"max_rounds": 0}}, "`policy.max_rounds`"),
        ({"policy": {"max_round": 1}}, "did you mean `max_rounds`"),
        ({"policy": {"share_metrics": True}, "privacy": PRIVATE}, "`policy.share_metrics` is true"),
        ({"policy": {"max_update_norm": 1.0}, "privacy": PRIVATE}, "with `privacy` leave it out"),
        ({"precision": "float16", "privacy": PRIVATE}, "`precision` float16"),
        ({"policy": {"strategies": ["fedftg"]}, "privacy": {**PRIVATE, "max_epsilon": 0.0}}, "`privacy.max_epsilon`"),
        ({"privacy": {**PRIVATE, "noise_multiplier": 0.0}}, "`privacy.noise_multiplier`"),
        ({"privacy": {**PRIVATE, "delta": 0.5}}, "`privacy.delta`"),
        ({"privacy": {**PRIVATE, "clip": float("inf")}}, "`privacy.clip`"),
        ({"privacy": {"clip": 1.0}}, "missing key `privacy.noise_multiplier`"),
    ],
)
def test_contradictions_are_refused_when_the_file_is_read(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        site(**sections)
    assert str(raised.value).startswith("site.yaml: ")
    assert reason in str(raised.value)


@pytest.mark.parametrize("strategy", ["fedsa-lora", "fedex-lora", "flora"])
def test_strategy_that_noise_was_not_made_for_is_refused(tmp_path: Path, strategy: str) -> None:
    allowed = "fedftg, flexlora, ffa-lora, fedsvd, rolora, fedit"
    with pytest.raises(PolicyError, match=f"`privacy` allows {allowed}; this is {strategy}$"):
        Site(tmp_path, privacy=PRIVATE).train(strategy=strategy)


def test_summary_says_what_left_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Site(tmp_path)
    own.train(1)
    refusal = PolicyError("this site's policy: no")
    own.gate().refuse(refusal, Failure.of(refusal))
    own = Site(tmp_path, privacy=PRIVATE)
    own.train(2)
    gate = own.gate()
    gate.check(federation(), asked(3))
    gate.charge(24, 10)  # a crash
    own.train(3, aside="noise alone leaves, training failed: ValueError at a.py:1")
    assert main(["ledger", "summary", str(own.ledger)]) == 0
    told = capsys.readouterr().out
    total = epsilon(3 * cost(4.0), 1e-5)
    for part in (
        "What left site site-a",
        "Federation ours, strategy fedftg, run 1",
        "3 (1 to 3); 4 charged, 3 updates sent, 2 of them noised",
        "evaluations      1 of held-out rows",
        "1 x noise alone leaves, training failed: ValueError at a.py:1",
        f"bytes of tensors {3 * 24}",
        "training rows    12 ",
        NAME,
        "not known",
        f"epsilon {total:.4g} at delta 1e-05, of at most 5",
        "1 updates left WITHOUT noise",
        "1 x this site's policy: no",
        verify(own.ledger).head,
    ):
        assert part in told
