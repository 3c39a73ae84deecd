"""A server that asks until it knows a row: what it could learn from a site without limits, and what is left of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ArrayRecord, Context, Message, RecordDict

from client import app as site_app
from client.privacy import guard
from client.reach import Reach
from client.session import Session
from common.config.federation import FederationConfig, resolved, settings_for_sites
from common.config.load import load
from common.errors import DataError, DivergedError, PolicyError, TrainingError, WireError
from common.protocol import wire
from common.protocol.messages import EvaluateReply, EvaluateRequest, HelloRequest, State, TrainReply, TrainRequest
from common.protocol.tensors import Tensors
from deploy.sandbox.tiny import make_federation
from strategies.flower.named import make_rule
from tests.harness.agreements import agree_all

PRIVACY = {"clip": 0.01, "noise_multiplier": 1.0, "delta": 1e-5, "max_epsilon": 1e6}
LORA = {"name": "fedit", "rank": 2, "blocks": "all", "modules": "linear"}
FEDFTG = {"name": "fedftg", "rank": 2, "blocks": "all", "modules": "linear"}


class Site:
    """A site that has agreed to a federation, asked by whoever holds its server; every message is a new process."""

    def __init__(
        self,
        folder: Path,
        terms: list[str] | None = None,
        own: dict[str, Any] | None = None,
        held_out: float = 0.25,
        **changes: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.file, self.site = make_federation(folder, {"site-a": 40}, **changes), folder / "site-a.yaml"
        site = yaml.safe_load(self.site.read_text())
        site["data"]["held_out"] = held_out
        self.site.write_text(yaml.safe_dump({**site, **(own or {})}))
        if terms is not None:
            rows = [json.dumps({"term": term, "title": "pain"}) for term in terms]
            (folder / "site-a.jsonl").write_text("\n".join(rows))
        agree_all(self.file)
        self.config = resolved(load(self.file, FederationConfig), self.file)
        self.settings = HelloRequest(federation=settings_for_sites(self.config), signatures=None)
        self.context = Context(1, 1, {"site": str(self.site)}, RecordDict(), {})
        self.ledger = folder / "site-a-ledger.jsonl"

    def session(self) -> Session:
        """The session that answers next."""
        site_app._sessions.clear()
        guard._books.clear()
        gate = site_app._gate("hello", self.context)
        return site_app._session(gate.site, gate.agreed(self.settings), self.context)

    def state(self, tensors: Tensors | None = None, number: int = 1) -> State:
        """The state of a round: the first one, or another one."""
        session = self.session()
        weights = session.weights
        held = session._tuned.get() if weights is None else weights.tensors
        active = make_rule(self.config.strategy, seed=0).active(max(number, 1), held)
        if weights is not None:
            about = {"version": weights.first, "since": weights.first}
            return State(server_round=number, active=active, arrays=ArrayRecord(), **about)
        return State(server_round=number, active=active, arrays=wire.encode(tensors or held, bundled=True))

    def train(self, state: State, *, evaluate: bool = False) -> Message:
        return self._ask("train", TrainRequest.of(self.settings, state, evaluate=evaluate).to_record())

    def evaluate(self, state: State) -> Message:
        request = EvaluateRequest.of(self.settings, replace(state, active=[]))
        return self._ask("evaluate", request.to_record())

    def hello(self) -> Message:
        return self._ask("query", self.settings.to_record())

    def _ask(self, kind: str, content: RecordDict) -> Message:
        site_app._sessions.clear()
        guard._books.clear()
        return site_app.app(Message(content, dst_node_id=1, message_type=kind), self.context)

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]


def form(reply: Message) -> dict[str, Any]:
    """All that can be seen of a reply but the values of noised numbers and the time."""
    if reply.has_error():
        return {"error": (reply.error.code, reply.error.reason)}
    told = TrainReply.read(reply.content)
    tensors = wire.decode(told.arrays)
    return {
        "records": {key: type(part).__name__ for key, part in reply.content.items()},
        "arrays": {key: (a.dtype, tuple(a.shape), a.stype, len(a.data)) for key, a in told.arrays.items()},
        "tensors": {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        "decays": {name: float(tensor) for name, tensor in tensors.items() if name.endswith("/decay")},
        "config": dict(reply.content["config"]),
        "metrics": {
            k: v for k, v in dict(reply.content["metrics"]).items() if k not in ("clock.started", "train.wire_error")
        },
        "wire_error": "train.wire_error" in reply.content["metrics"],
    }


# A row spelled out by questions that only one prefix cannot answer

PREFIX = "Z"
COMMON = [f"acute pain {'abcdefghij'[i % 10]}" for i in range(24)]


def overflowing(site: Site) -> State:
    """A LoRA A so large that only rows with a token of the prefix overflow: two directions that cancel, unless inf."""
    session = site.session()
    tokenizer, tensors = session.model.base.tokenizer, dict(session._tuned.get())
    model = session._tuned.model.get_base_model()
    assert isinstance(model, torch.nn.Module)
    embedded = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    normed = embedded * torch.rsqrt(embedded.square().mean(1, keepdim=True) + 1e-6)
    (token,) = tokenizer.encode(PREFIX, add_special_tokens=False)
    others = sorted({i for e in session._encoded for i in e.input_ids} - {token})
    assert len(others) > 10
    direction = normed[token] / normed[token].square().sum()
    nearest = float((normed[others] @ direction).abs().max())
    assert nearest < 0.9
    for name, tensor in tensors.items():
        if "layers.0.self_attn.q_proj" in name:
            row = direction * 3.4e38 / (0.5 + nearest / 2)
            tensors[name] = torch.stack([row, -row]) if "lora_A" in name else torch.ones_like(tensor)
    return site.state(tensors)


def test_question_that_only_one_prefix_cannot_answer_is_answered_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit for a message, error or none, spells a row out in some three hundred of them.

    That such a state is refused is proved elsewhere; here it gets through.
    """
    for check in ("check", "check_like"):
        monkeypatch.setattr(Reach, check, lambda *_: None)
    spelled = [f"{PREFIX}ed", *COMMON[1:]]
    training = {"local_steps": None, "local_epochs": 1}
    seen = {}
    for privacy in (None, PRIVACY):
        for name, terms in (("without", COMMON), ("with", spelled)):
            folder = tmp_path / f"{name}-{privacy is None}"
            own = {"privacy": privacy} if privacy else {}
            site = Site(folder, terms, own, 0.0, strategy=LORA, training=training, admission={"max_noise": 1.0})
            seen[name, privacy is None] = form(site.train(overflowing(site)))
            if privacy:
                charged, sent = site.entries()[-2:]
                assert (charged["event"], sent["event"]) == ("charged", "sent")
                assert (sent["aside"] is None) == (name == "without")
    sentence = "the numbers of its training overflowed; lower training.learning_rate; the site's own log says more"
    assert seen["with", True] == {"error": (DivergedError.code, sentence)}  # the attack works on a site without noise
    assert "error" not in seen["without", True]
    assert seen["with", False] == seen["without", False]
    assert "error" not in seen["with", False]


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def bad_row(*_: Any, **__: Any) -> Any:
    raise DataError("rows.jsonl, row 7: column 'term' is empty")


def secret(*_: Any, **__: Any) -> Any:
    raise ValueError("acute pain of Mrs Miller")


STRATEGIES: list[dict[str, Any]] = [
    {**FEDFTG, "subspace": "own"},
    {**FEDFTG, "subspace": "shared"},
    {**FEDFTG, "subspace": "shared", "wire_precision": "int8"},
    {**LORA, "name": "rolora"},
    {**LORA, "name": "flexlora"},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: "-".join(map(str, s.values())))
def test_failure_after_the_charge_looks_like_an_honest_update(
    tmp_path: Path, strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"weight_decay": 0.1, "schedule": "linear"}
    site = Site(tmp_path, own={"privacy": PRIVACY}, strategy=strategy, training=training)
    honest = form(site.train(site.state()))
    assert "error" not in honest
    asides = {}
    for broken, where in ((no_memory, "loss_sum"), (bad_row, "examples"), (secret, "collater")):
        with monkeypatch.context() as patch:
            patch.setattr(f"common.data.tasks.CausalLM.{where}", broken)
            assert form(site.train(site.state())) == honest
        asides[where] = site.entries()[-1]["aside"]
    assert "out of memory in round 1, step 1" in asides["loss_sum"]
    assert "row 7: column 'term' is empty" in asides["examples"]
    assert asides["collater"].startswith("noise alone leaves, training failed: ValueError at test_asking.py")
    assert "Miller" not in site.ledger.read_text()
    charged = [entry for entry in site.entries() if entry["event"] == "charged"]
    sent = [entry for entry in site.entries() if entry["event"] == "sent"]
    assert [s["charged"] for s in sent] == [c["line"] for c in charged]
    assert all(0 < s["out"]["bytes"] <= c["bytes"] for c, s in zip(charged, sent, strict=True))
    assert sent[-1]["privacy"]["epsilon_total"] == charged[-1]["privacy"]["epsilon_total"] > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", [STRATEGIES[0], STRATEGIES[1], STRATEGIES[3]], ids=["own", "shared", "rolora"])
def test_loss_that_is_not_finite_counts_as_zero_and_training_goes_on(
    tmp_path: Path, strategy: dict[str, Any], loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.data.tasks import CausalLM

    site = Site(tmp_path, own={"privacy": PRIVACY}, strategy=strategy, training={"weight_decay": 0.1})
    honest, right, calls = form(site.train(site.state())), CausalLM.loss_sum, []

    def sometimes(self: CausalLM, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        calls.append(1)
        summed, counted = right(self, model, batch)
        return (summed * loss if len(calls) == 2 else summed), counted

    monkeypatch.setattr(CausalLM, "loss_sum", sometimes)
    assert form(site.train(site.state())) == honest
    assert len(calls) == 3  # steps
    assert site.entries()[-1]["aside"] == "1 losses or gradients were not finite and count as zero"


def test_crash_after_the_charge_stays_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, own={"policy": {"max_rounds": 1, "min_rows_per_update": 1}})
    state = site.state()

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            site.train(state)
    assert [entry["event"] for entry in site.entries()] == ["begun", "charged"]
    assert "`max_rounds` is 1; all of them are trained" in site.train(state).error.reason


def test_without_privacy_a_failure_has_one_sentence_for_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)
    state, said = site.state(), {}
    for broken, where in ((no_memory, "loss_sum"), (bad_row, "examples"), (secret, "collater")):
        with monkeypatch.context() as patch:
            patch.setattr(f"common.data.tasks.CausalLM.{where}", broken)
            error = site.train(state).error
        said[where] = error.code, error.reason
    more = "; the site's own log says more"
    assert said["loss_sum"] == (
        TrainingError.code,
        f"its training could not start or go on, as when memory runs out{more}",
    )
    assert said["examples"] == (DataError.code, f"its shard cannot be used{more}")
    assert "Miller" not in said["collater"][1]


# A held-out row read by evaluations


def scores(reply: Message) -> dict[str, float]:
    return dict(EvaluateReply.read(reply.content).scores)


def test_evaluations_end_with_what_was_agreed(tmp_path: Path) -> None:
    """310 of them, after the last round, read a row whole."""
    site = Site(tmp_path, own={"policy": {}}, held_out=0.5, strategy=LORA, evaluation={"max_examples": 64, "every": 2})
    state = site.state(number=2)
    refused = site.evaluate(replace(state, server_round=3)).error
    assert (refused.code, "a message of round 3; allowed: up to 2" in refused.reason) == (WireError.code, True)
    answered = 0
    while not (reply := site.evaluate(state)).has_error():
        told, answered = scores(reply), answered + 1
        step = 0.1 if told["examples"] < 20 else 0.05
        assert told["examples"] >= 10
        assert told["loss"] / step == pytest.approx(round(told["loss"] / step))
        assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
        assert answered < 310
    assert answered == 6  # one before the two rounds and one after, three times
    assert (reply.error.code, "`max_evaluations` is 6" in reply.error.reason) == (PolicyError.code, True)
    trained = site.train(site.state(), evaluate=True)  # the round is worth more than its scores
    assert TrainReply.read(trained.content).scores == {}
    assert sum(entry.get("evaluation", False) for entry in site.entries()) == 6


def test_rounds_end_with_what_was_agreed(tmp_path: Path) -> None:
    site = Site(tmp_path, own={"policy": {"min_rows_per_update": 1}}, strategy=LORA)
    state, answered = site.state(), 0
    while not (reply := site.train(state)).has_error():
        answered += 1
        assert answered < 10
    assert answered == 6  # two rounds, three times
    assert "agreed to 2 rounds and has trained 3 times as many" in reply.error.reason
    file = tmp_path / "site-a-agreements.json"
    file.write_text(file.read_text().replace('"agreed": "2', '"agreed": "3'))  # its people agree anew
    assert not site.train(state).has_error()


def test_scores_of_few_rows_stay_at_the_site(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, evaluation in enumerate(({"max_examples": 9}, {"max_examples": 64, "generate": 9})):
        site = Site(tmp_path / str(number), own={"policy": {}}, held_out=0.5, strategy=LORA, evaluation=evaluation)
        told = scores(site.evaluate(site.state(number=0)))
        if number == 0:
            assert told == {}
            assert "no scores leave: of 9 held-out rows, `policy.min_held_out` is 10" in caplog.text
        else:
            assert told.keys() == {"loss", "perplexity", "tokens", "examples"}


# A row's gradient as an update

ONE_ROW = {"optimizer": "sgd", "batch_size": 1, "local_steps": 1, "max_grad_norm": None, "learning_rate": 0.01}


def test_update_of_one_row_is_refused_before_the_row_is_read(tmp_path: Path) -> None:
    """The update of one step of SGD is the row's gradient."""
    state, gradient = {}, {}
    for limits in ({}, {"min_rows_per_update": 1}):
        site = Site(
            tmp_path / str(len(limits)), own={"policy": limits}, strategy={**LORA, "name": "ffa-lora"}, training=ONE_ROW
        )
        state = site.state()
        if not limits:
            (site.site.parent / "site-a.jsonl").unlink()  # whoever opened it would say so
            for reply in (site.hello(), site.train(state)):
                assert reply.error.code == PolicyError.code
                assert "`min_rows_per_update` is 8; a round here trains on fewer rows" in reply.error.reason
            continue
        before = wire.decode(state.arrays)
        after = wire.decode(TrainReply.read(site.train(state).content).arrays)
        session, cosines = site.session(), []
        collate = session._task.collater(session.model.base.tokenizer)
        moved = torch.cat([(before[name] - after[name]).flatten() for name in after])
        for example in session._encoded:
            for name, parameter in session._tuned.parameters.items():
                parameter.grad = None
                parameter.requires_grad_(name in after)
            session._task.loss_sum(session._tuned.model, collate([example]))[0].backward()
            gradient = {name: parameter.grad for name, parameter in session._tuned.parameters.items() if name in after}
            flat = torch.cat([gradient[name].flatten() for name in after])
            cosines.append(float(torch.cosine_similarity(moved, flat, dim=0)))
        assert max(cosines) > 0.999  # what the limit stands against


def test_few_rows_of_the_shard_count_once(tmp_path: Path) -> None:
    site = Site(tmp_path, [f"row {i}" for i in range(7)], {"policy": {}}, 0.0, strategy=LORA)
    assert "`min_rows_per_update` is 8" in site.train(site.state()).error.reason  # three steps of four rows, of seven
