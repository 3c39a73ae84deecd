"""What crosses the line: it comes out as it went in, and nothing else comes in."""

import ast
import contextlib
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings, strategies as st

from client.connect import verify
from client.training.trainer import TrainResult
from common.errors import DataError, DivergedAverage, RefusedUpdate, WireError
from common.metrics import SCORES
from common.protocol import messages
from common.protocol.fields import Content
from common.protocol.measures import EVALUATED, TRAINING
from common.protocol.messages import (
    Declared,
    DeliverReply,
    DeliverRequest,
    EvaluateReply,
    EvaluateRequest,
    Failure,
    Hello,
    HelloRequest,
    State,
    TrainReply,
    TrainRequest,
    failures,
)
from tests.harness.processes import ROOT

ARRAYS = ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", b"1234")})
NOISE = Declared(clip=0.5, noise=4.0, delta=1e-5, max_epsilon=8.0)
SETTINGS = HelloRequest(federation='{"name": "x"}', signatures="[]")
STATE = State(server_round=3, active=["w"], version="b" * 64, since="a" * 64, arrays=ArrayRecord(), steps={2: ARRAYS})
ONE_OF_EACH: list[Content] = [
    SETTINGS,
    TrainRequest.of(SETTINGS, STATE, evaluate=True),
    EvaluateRequest.of(HelloRequest(federation="{}", signatures=None), STATE),
    Hello(
        site="site-a",
        train_rows=9,
        held_out_rows=1,
        device="cpu",
        rank=0,
        base_digest="b" * 64,
        tokenizer_digest="t",
        version="0.1.0",
        privacy=NOISE,
        seconds={"load": 1.5},
        clock={"started": 1e9, "finished": 1e9 + 1},
    ),
    TrainReply(
        server_round=3,
        arrays=ARRAYS,
        num_examples=9,
        lora_alpha=16.0,
        training={"loss": 0.5, "steps": 3.0},
        scores={"loss": 1.0, "mcc": -0.5},
        version="b" * 64,
    ),
    EvaluateReply(scores={"loss": math.inf, "examples": 2.0}),
    DeliverRequest(**vars(SETTINGS), **vars(STATE), about="{}"),
    DeliverReply(files="f" * 64),
]


def sent(content: RecordDict) -> RecordDict:
    """As it arrives on the other side of Flower."""
    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize("content", ONE_OF_EACH, ids=lambda content: type(content).__name__)
def test_message_comes_out_as_it_went_in(content: Content) -> None:
    assert type(content).read(sent(content.to_record())) == content


TEXT = st.text(min_size=1, max_size=64)
LINE = st.text(st.characters(categories=["L", "M", "N", "P", "S"]), min_size=1, max_size=64)
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
AMOUNT, LOSS = st.floats(0, 1e15), st.floats(0, 1e9) | st.just(math.inf)
NUMBERS = st.fixed_dictionaries(
    {}, optional={name: st.floats(one.least, 1) if one.bounded else LOSS for name, one in SCORES.items()}
)
TRAINED = st.fixed_dictionaries(
    {"loss": LOSS, "wire_error": st.floats(0, 1)},
    optional={name: AMOUNT for name in TRAINING if "loss" not in name and name != "wire_error"},
)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Hello,
        site=NAME,
        train_rows=st.integers(1, 2**53),
        held_out_rows=st.integers(0, 2**53),
        device=LINE,
        rank=st.integers(0, 999),
        base_digest=LINE,
        tokenizer_digest=LINE,
        version=LINE,
        privacy=st.none() | st.builds(Declared, *[st.floats(1e-300, 1e15)] * 4),
        seconds=st.dictionaries(st.sampled_from(["load", "train", "evaluate"]), AMOUNT),
    )
    | st.builds(
        TrainReply,
        server_round=st.integers(1, 999_999),
        arrays=st.just(ARRAYS),
        num_examples=st.integers(1, 2**53),
        lora_alpha=st.none() | st.floats(1e-300, 1e15),
        training=TRAINED,
        scores=NUMBERS,
        frozen_digest=st.none() | LINE,
    )
    | st.builds(
        EvaluateRequest,
        federation=TEXT,
        signatures=st.none() | TEXT,
        server_round=st.integers(0, 999_999),
        active=st.lists(LINE, unique=True),
        since=LINE,
        version=LINE,
        arrays=st.just(ArrayRecord()),
        steps=st.dictionaries(st.integers(1, 999_999), st.just(ARRAYS), max_size=3),
    )
)
def test_any_message_comes_out_as_it_went_in(content: Content) -> None:
    assert type(content).read(sent(content.to_record())) == content


HELLO, TRAIN, REPLY = ONE_OF_EACH[3], ONE_OF_EACH[1], ONE_OF_EACH[4]
Change = Callable[[RecordDict], object]


def put(record: str, key: str, value: object) -> Change:
    """Change one value; None: take it out."""

    def change(content: RecordDict) -> None:
        part: Any = content[record]
        values = {**part, key: value}
        content[record] = type(part)({k: v for k, v in values.items() if v is not None})

    return change


def record(key: str, value: object) -> Change:
    """Put, or with None take out, a whole record."""
    return lambda content: content.pop(key) if value is None else content.__setitem__(key, value)


@pytest.mark.parametrize(
    ("content", "change", "says"),
    [
        (HELLO, record("more", ConfigRecord()), r"unknown record 'more'; allowed: metrics, config, privacy"),
        (HELLO, put("config", "patient", "x"), r"unknown key 'patient' in 'config'; allowed: site, train_rows, .*rank"),
        (HELLO, put("metrics", "train.loss", 1.0), r"unknown key 'train.loss' in 'metrics'; allowed: seconds.load, "),
        (HELLO, put("metrics", "seconds.lunch", 1.0), r"unknown key 'seconds.lunch' in 'metrics'"),
        (HELLO, put("privacy", "salt", 1.0), r"unknown key 'salt' in 'privacy'; allowed: clip, noise, delta, max_eps"),
        (HELLO, put("config", "x" * 999, 1), r"unknown key 'x{79}\.\.\. \(1001 characters\) in 'config'"),
        (HELLO, record("config", None), r"the message has no 'config' record"),
        (HELLO, record("config", ARRAYS), r"the message has no 'config' record"),
        (HELLO, record("config", MetricRecord({"rank": 1})), r"record 'config' is a MetricRecord; allowed: numbers in"),
        (HELLO, record("metrics", ConfigRecord({"seconds.load": 1.0})), r"record 'metrics' is a ConfigRecord"),
        (HELLO, put("config", "site", None), r"site is missing; allowed: letters, digits"),
        (HELLO, put("config", "site", "../site"), r"site is '\.\./site'; allowed: letters, digits"),
        (HELLO, put("config", "site", "s" * 65), r"site is 's+'; allowed: .* up to 64"),
        (HELLO, put("config", "train_rows", 0), r"train_rows is 0; allowed: a whole number from 1"),
        (HELLO, put("config", "train_rows", 9.0), r"train_rows is 9.0; allowed: a whole number from 1"),
        (HELLO, put("config", "train_rows", True), r"train_rows is True; allowed: a whole number from 1"),
        (HELLO, put("config", "train_rows", 2**60), r"train_rows is \d+; allowed: a whole number from 1"),
        (HELLO, put("config", "held_out_rows", -1), r"held_out_rows is -1; allowed: a whole number from 0"),
        (HELLO, put("config", "device", ""), r"device is ''; allowed: text of 1 to 256 printable characters"),
        (
            HELLO,
            put("config", "base_digest", "b" * 65),
            r"base_digest is 'b+'; allowed: text of 1 to 64 printable char",
        ),
        (HELLO, put("config", "rank", "2"), r"rank is '2'; allowed: a whole number from 0"),
        (HELLO, put("config", "rank", [2]), r"rank is \[2\]; allowed"),
        (HELLO, put("privacy", "noise", math.nan), r"noise is nan; allowed: a positive number"),
        (HELLO, put("privacy", "clip", 0.0), r"clip is 0.0; allowed: a positive number"),
        (HELLO, put("privacy", "delta", None), r"delta is missing; allowed: a positive number"),
        (HELLO, put("metrics", "seconds.load", -1.0), r"seconds.load is -1.0; allowed: a number from 0 to 1e\+15"),
        (HELLO, put("metrics", "clock.started", math.inf), r"clock.started is inf; allowed: a positive number"),
        (REPLY, record("arrays", None), r"the message has no 'arrays' record"),
        (REPLY, record("arrays", ConfigRecord()), r"the message has no 'arrays' record"),
        (REPLY, record("step-000001", ARRAYS), r"unknown record 'step-000001'; allowed: .*arrays"),
        (REPLY, record("privacy", ConfigRecord({"clip": 1.0})), r"unknown record 'privacy'"),
        (REPLY, put("metrics", "num-examples", None), r"num-examples is missing; allowed: a whole number from 1"),
        (REPLY, put("metrics", "num-examples", -15), r"num-examples is -15; allowed: a whole number from 1"),
        (REPLY, put("metrics", "num-examples", [9]), r"num-examples is \[9\]; allowed: a whole number from 1"),
        (REPLY, put("metrics", "lora-alpha", -1.0), r"lora-alpha is -1.0; allowed: a positive number"),
        (REPLY, put("metrics", "train.loss", -1.0), r"train.loss is -1.0; allowed: a number from 0"),
        (REPLY, put("metrics", "train.seconds", math.nan), r"train.seconds is nan; allowed: a number from 0 to 1e\+15"),
        (REPLY, put("metrics", "train.wire_error", 1.1), r"train.wire_error is 1.1; allowed: a number from 0 to 1"),
        (REPLY, put("metrics", "evaluate.mcc", -1.1), r"evaluate.mcc is -1.1; allowed: a number from -1 to 1"),
        (REPLY, put("metrics", "evaluate.bleu_4", math.nan), r"evaluate.bleu_4 is nan; allowed: a number from 0 to 1"),
        (REPLY, put("metrics", "train.steps", -1.0), r"train.steps is -1.0; allowed: a number from 0 to 1e\+15"),
        (REPLY, put("metrics", "train.rows", 1.0), r"unknown key 'train.rows' in 'metrics'; allowed: .*train.tokens"),
        (REPLY, put("metrics", "evaluate.loss", [1.0]), r"evaluate.loss is \[1.0\]; allowed: a number"),
        (REPLY, put("metrics", "evaluate.confusion/0/1", 3.0), r"unknown key 'evaluate.confusion/0/1'"),
        (REPLY, put("config", "server-round", 0), r"server-round is 0; allowed: a whole number from 1"),
        (REPLY, put("config", "since", "a"), r"unknown key 'since' in 'config'"),
        (TRAIN, record("step-2", ARRAYS), r"unknown record 'step-2'; allowed: .*step-NNNNNN"),
        (TRAIN, record("step-000003", ConfigRecord()), r"the message has no 'step-000003' record"),
        (TRAIN, put("config", "active", ["w", "w"]), r"active is \['w', 'w'\]; allowed: a list of up to \d+ different"),
        (TRAIN, put("config", "active", ["w" * 513]), r"active is .*; allowed: .* of 1 to 512 printable characters"),
        (TRAIN, put("config", "active", [1]), r"active is \[1\]; allowed"),
        (TRAIN, put("config", "active", "w"), r"active is 'w'; allowed: a list"),
        (TRAIN, put("config", "evaluate", 1), r"evaluate is 1; allowed: true or false"),
        (TRAIN, put("config", "federation", "f" * (2**20 + 1)), r"federation is .*; allowed: text of 1 to 1048576"),
        (TRAIN, put("config", "federation", None), r"federation is missing; allowed: text"),
        (TRAIN, put("config", "version", None), r"steps come without the version"),
        (TRAIN, put("config", "since", None), r"steps come without the version"),
        (TRAIN, put("config", "learning_rate", 1.0), r"unknown key 'learning_rate' in 'config'; allowed: .*since"),
    ],
)
def test_what_is_not_declared_is_refused_by_name(content: Content, change: Change, says: str) -> None:
    arrived = sent(content.to_record())
    change(arrived)
    with pytest.raises(WireError, match=says):
        type(content).read(arrived)


VALUES = st.integers() | st.floats() | st.text() | st.booleans()
KEYS = st.sampled_from(sorted({k for one in ONE_OF_EACH for keys in one.known().values() for k in keys})) | st.text()
RECORDS = (
    st.dictionaries(KEYS, VALUES | st.lists(st.text()) | st.lists(st.floats())).map(ConfigRecord)
    | st.dictionaries(KEYS, st.integers(-(2**63), 2**63 - 1) | st.floats() | st.lists(st.floats())).map(MetricRecord)
    | st.just(ARRAYS)
)
NAMES = (
    st.sampled_from(["config", "metrics", "arrays", "privacy", "step-000001", "step-1", "step-", "step-é"]) | st.text()
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, RECORDS))
def test_whatever_comes_is_read_or_refused(records: dict[str, Any]) -> None:
    for kind in {type(content) for content in ONE_OF_EACH}:
        with contextlib.suppress(WireError):
            kind.read(RecordDict(records))
    assert Hello.site_in(RecordDict(records)) is None or "site" in records["config"]


def test_nothing_is_sent_that_the_other_side_would_refuse() -> None:
    with pytest.raises(WireError, match=r"train\.luck is not declared; allowed: loss, "):
        TrainReply(server_round=1, arrays=ARRAYS, num_examples=1, training={"luck": 1.0}).to_record()
    with pytest.raises(WireError, match="num-examples is 0; allowed: a whole number from 1"):
        TrainReply(server_round=1, arrays=ARRAYS, num_examples=0).to_record()


def test_hello_that_cannot_be_read_still_says_whose_it_is() -> None:
    arrived = HELLO.to_record()
    put("config", "train_rows", 0)(arrived)
    assert Hello.site_in(arrived) == "site-a"
    put("config", "site", "no name")(arrived)
    assert Hello.site_in(arrived) is None
    assert Hello.site_in(RecordDict()) is None
    assert Hello.site_in(RecordDict({"config": MetricRecord({"site": 1})})) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.7e308, 1.1e9])
def test_loss_of_a_model_that_has_diverged_is_read_as_infinite(loss: float) -> None:
    told = EvaluateReply(scores={"loss": loss, "perplexity": loss})
    assert EvaluateReply.read(sent(told.to_record())).scores == {"loss": math.inf, "perplexity": math.inf}


def test_what_rounding_adds_to_a_share_is_taken_away() -> None:
    told = EvaluateReply(scores={"bleu_4": 1.0000000000000002, "mcc": -1.0000000000000002})
    assert EvaluateReply.read(sent(told.to_record())).scores == {"bleu_4": 1.0, "mcc": -1.0}


def test_numbers_have_the_names_that_training_and_tasks_give_them() -> None:
    made = {one.name for one in fields(TrainResult)} - {"not_finite"}  # of which nothing is told
    assert made == TRAINING.keys() - {"wire_error", "rows_left_out", "clipped"}
    assert SCORES.keys() < EVALUATED.keys()


def test_failure_comes_out_as_it_went_in_and_its_code_names_its_class() -> None:
    failure = Failure.of(DataError("shard x.jsonl: 3 rows without an answer"))
    assert Failure.read(failure.to_error()) == failure
    assert failure.kind == "DataError"
    assert Failure(ErrorCode.NODE_UNAVAILABLE, "").kind == "NODE_UNAVAILABLE"
    assert {1001, 1002, DataError.code, ErrorCode.CLIENT_APP_CRASHED} <= failures().keys()
    assert RefusedUpdate.code not in failures()  # the server's own
    told = Failure.of(DivergedAverage("while an adapter was cut"))
    assert (told.kind, told.reason) == ("FedSpanError", "while an adapter was cut")


@pytest.mark.parametrize("letter", ["x", "ä", "\x1b", "\U0001f600", "x  "])
def test_longer_reason_is_cut_by_who_sends_it_and_by_who_reads_it(letter: str) -> None:
    cut = Failure(DataError.code, letter * 9999).to_error()
    assert cut.reason.endswith(" ...")
    assert 600 < len(cut.reason.encode()) <= 1024
    assert Failure.read(cut).reason == cut.reason
    assert Failure.read(Error(DataError.code, letter * 9999)).reason == cut.reason


def test_error_that_nothing_has_the_code_of_is_refused() -> None:
    with pytest.raises(WireError, match=r"code 999; allowed: 0, 1, .*1000, 1001, "):
        Failure.read(Error(999, "x"))


def test_training_code_knows_the_page_without_flower() -> None:
    code = "import sys, client.session, common.protocol.messages; print('flwr' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


PAGE = ("common/protocol/messages.py", "common/protocol/exchanges.py", "common/protocol/fields.py")
PRODUCT = ("client", "common", "deploy", "server", "strategies")
#: Keys that are everyday words, too: what else in the product has that name.
ELSEWHERE = {
    "site": "a column, an option, a logger, a key of files",
    "config": "a model's attribute",
    "version": "a site's, in a run's files",
    "device": "a site's, in files and on the command line",
    "rank": "an optimizer's, a setting's",
    "federation": "an option, a key of files",
    "evaluate": "a phase in a run's records",
    "privacy": "a section of the site file, a key of files",
    "active": "the state of a registered key",
    "base_digest": "a key of run.json",
    "tokenizer_digest": "a key of run.json",
    "delta": "a key of the ledger",
    "clip": "a key of the ledger",
    "noise": "a check before joining",
    "max_epsilon": "a key of the ledger",
    "train.tsv": "a file of GLUE",
    "since": "a key of a site's status",
}
#: Files that import nothing of ours, with the copy of a key that they hold.
COPIES = {"client/connect/verify.py": "bundle-signatures", "client/connect/worker_process.py": "config"}


def literals(file: Path) -> Iterator[str]:
    """All constant texts of a file but for docstrings, those within f-strings included."""
    tree = ast.parse(file.read_text())
    spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield node.value


def declared() -> tuple[set[str], set[str]]:
    """Keys of records and values, and prefixes of groups."""
    keys: set[str] = set()
    for content in (HelloRequest, TrainRequest, EvaluateRequest, Hello, Declared, TrainReply, EvaluateReply):
        keys |= {key for record, inner in content.known().items() for key in (record, *inner)}
    prefixes = {key.partition(".")[0] + "." for key in keys if "." in key} | {"step-"}
    return keys, prefixes


def test_keys_of_messages_stand_on_the_page_alone() -> None:
    keys, prefixes = declared()
    assert {"server-round", "num-examples", "arrays", "evaluate.loss", "train_rows"} <= keys
    assert prefixes == {"train.", "evaluate.", "seconds.", "clock.", "step-"}
    found, elsewhere = set(), set()
    for file in (file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")):
        name = str(file.relative_to(ROOT))
        for text in literals(file):
            if (text in keys or text.startswith(tuple(prefixes))) and name not in PAGE:
                elsewhere |= {text} & ELSEWHERE.keys()
                found |= {(name, text)} if text not in ELSEWHERE else set()
    assert found == {(name, key) for name, key in COPIES.items() if key not in ELSEWHERE}
    assert elsewhere == ELSEWHERE.keys()


def test_records_are_made_and_opened_on_the_page_alone() -> None:
    opened = re.compile(
        r"\.(config_records|metric_records)\b|\.content\[|\.content\.get\(|\bMetricRecord\(|RecordDict\(\{"
    )
    allowed = {*PAGE, "client/connect/worker_process.py", "strategies/flower/strategy.py"}
    names = [str(f.relative_to(ROOT)) for folder in PRODUCT for f in (ROOT / folder).rglob("*.py")]
    assert [n for n in names if n not in allowed and opened.search((ROOT / n).read_text())] == []


def test_copies_of_keys_are_the_keys() -> None:
    assert verify.RECORD_KEY == messages.SIGNATURES
    text = (ROOT / "client/connect/worker_process.py").read_text()
    assert f'message.content.get("{messages.CONFIG}")' in text
