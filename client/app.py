"""The Flower ClientApp of a site: takes a message, lets the session work, answers.

Heavy modules are imported only when a message is there. A ``FedSpanError`` is answered with its text; of any other
exception only type and place leave the site, because its text might quote a row.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from common.config.federation import FederationConfig, SiteConfig
from common.config.load import load, parse
from common.errors import ConfigError, FedSpanError, WireError
from common.protocol.declared_noise import Declared
from common.protocol.messages import Failure
from common.protocol.records import get_record, get_records
from common.system import logs

if TYPE_CHECKING:
    from torch import Tensor

    from client.held_weights import Weights
    from client.privacy.guard import Gate
    from client.session import Session
    from client.shared_base import Bases
    from common.protocol.versions import Step

app = ClientApp()
log = logging.getLogger("site")

SITE_KEY = "site"  # node-config key: path of the site file
LEDGERS_KEY = "ledgers"  # node-config key of an experiment's cell: folder of its ledgers, instead of the site file's
VETTED = "FEDSPAN_VETTED"  # environment variable: the site's worker found that the site trusts this bundle
LONG_LIVED = "FEDSPAN_WORKER"  # environment variable: this process answers more than one message
SESSIONS = "FEDSPAN_SESSIONS"  # environment variable: how many sites this process holds at a time; without it, one
_FROZEN = "frozen"  # the context's record of frozen tensors kept for the next message
_STEP = "step-"  # prefix of records of steps, in messages and in the context, before the number of the round
_HELD = "held"  # the context's record that names the version of the weights that its steps lead to
_KEPT = "kept"  # the context's record of what never leaves the site: a local head, optimizer moments

_sessions: dict[tuple[int, str, str, str], "Session"] = {}  # by run, because files may change between runs
_bases: dict[int, "Bases"] = {}  # by run; of the sites that this process holds, when they are several
Handler = Callable[["Session", Message, Context], RecordDict]


def _answering(handler: Handler) -> Callable[[Message, Context], Message]:
    """Turn what a handler returns, or raises, into a reply."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        gate: Gate | None = None
        try:
            logs.configure("site")
            started = time.time()
            gate = _gate(handler.__name__, context)
            session = _session(gate.site, message, context)
            request = get_record(message.content, "config", ConfigRecord)
            gate.check(session.federation, _number(request), _names(request))
            gate.check_rows(session.train_rows)
            content = handler(session, message, context)
            clock = {"clock.started": started, "clock.finished": time.time()}
            shared = gate.shared({**get_record(content, "metrics", MetricRecord), **clock})
            content["metrics"] = MetricRecord(shared)
            told = sorted({*shared, *(name for facts in get_records(content, ConfigRecord).values() for name in facts)})
            gate.admit(_each(message.content), _each(content), told, session.train_rows, session.update_norm)
            log.info("%s done in %.1f s", handler.__name__, time.time() - started, extra=_known(message, context, gate))
        except Exception as error:  # noqa: BLE001 - whatever happens at a site, the operator gets an answer
            return Message(_error(error, gate, _known(message, context, gate)).to_error(), reply_to=message)
        return Message(content, reply_to=message)

    return answer


def _known(message: Message, context: Context, gate: "Gate | None") -> dict[str, object]:
    """What a line of the log says of the message it is about."""
    request = get_record(message.content, "config", ConfigRecord)
    site = None if gate is None else gate.site.name
    kind = message.metadata.message_type
    return {"run": str(context.run_id), "site": site, "round": request.get("server-round"), "event": kind}


def _error(error: Exception, gate: "Gate | None", known: dict[str, object]) -> Failure:
    """What the operator hears of an error; of one that is not FedSpan's own, type and place only."""
    if isinstance(error, FedSpanError):
        failure = Failure.of(error)
        if gate is None:
            log.error("%s", error, extra=known)
    else:
        log.error("unexpected error", exc_info=error, extra=known)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        reason = f"{type(error).__name__} at {where}; the site's log says more"
        failure = Failure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    return failure if gate is None else gate.refuse(error, failure)


@app.query()
@_answering
def hello(session: "Session", message: Message, context: Context) -> RecordDict:
    """Tell who this is, which base model it holds and what noise it adds."""
    del message, context
    told = RecordDict({"config": ConfigRecord(asdict(session.hello())), "metrics": MetricRecord({**session.seconds()})})
    if session.site.privacy is not None:
        told["privacy"] = ConfigRecord(asdict(Declared.of(session.site.privacy)))
    return told


@app.train()
@_answering
def train(session: "Session", message: Message, context: Context) -> RecordDict:
    """Evaluate the state that came in, when asked to; train; send back the active tensors."""
    from common.protocol import wire

    request = get_record(message.content, "config", ConfigRecord)
    active = _names(request)
    holds = _receive(session, message, context, active)
    measured = session.evaluate() if request.get("evaluate") else {}
    number = int(request["server-round"])  # type: ignore[arg-type]
    trained, metrics = session.train(number, active)
    context.state[_KEPT] = wire.encode(session.kept)
    return RecordDict(
        {
            "arrays": wire.encode(trained, bundled=True),
            "config": ConfigRecord({**holds, "server-round": number}),
            "metrics": MetricRecord({**metrics, **measured, **session.seconds()}),
        }
    )


@app.evaluate()
@_answering
def evaluate(session: "Session", message: Message, context: Context) -> RecordDict:
    """Evaluate the state that came in."""
    _receive(session, message, context, [])
    measured = session.evaluate()
    return RecordDict({"metrics": MetricRecord({**measured, **session.seconds()})})


def _receive(
    session: "Session", message: Message, context: Context, active: list[str]
) -> dict[str, ConfigRecordValues]:
    """Bring the session to the state of a message; what the reply says of what this site holds from now on."""
    from common.protocol import wire

    session.kept = wire.decode(get_record(context.state, _KEPT, ArrayRecord))
    request = get_record(message.content, "config", ConfigRecord)
    version, since = _text(request, "version"), _text(request, "since")
    weights = session.weights
    if weights is not None and since is not None and version is not None:
        held = _text(get_record(context.state, _HELD, ConfigRecord), "version")
        if weights.version == weights.first and held is not None:  # a new process goes on where the last one was
            session.follow(_steps(context.state), weights.first, held)
        session.follow(_steps(message.content), since, version)
        return _keep_steps(session.weights or weights, context)
    digest = _text(request, "frozen-digest")
    frozen = session.set_state(_tensors(message, context), digest, active, version or "unknown")
    if weights is not None:
        return _keep_steps(weights, context)
    if active:
        context.state[_FROZEN] = wire.encode(frozen)
    return {"frozen-digest": digest} if frozen and digest is not None else {}


def _keep_steps(weights: "Weights", context: Context) -> dict[str, ConfigRecordValues]:
    """Let the next process make the weights again from the base model, as long as that takes little to keep."""
    from common.protocol import wire

    steps = {f"{_STEP}{step.server_round:06}": step for step in weights.steps or []}
    for key in [key for key in context.state if key.startswith(_STEP) and key not in steps]:
        del context.state[key]
    for key, step in steps.items():
        if key not in context.state:
            context.state[key] = wire.encode(step.tensors)
    context.state.pop(_HELD, None)
    if weights.steps is not None:
        context.state[_HELD] = ConfigRecord({"version": weights.version})
    lasting = weights.steps is not None or LONG_LIVED in os.environ
    return {"version": weights.version} if lasting else {}


def _steps(content: RecordDict) -> "list[Step]":
    """The steps among the records of a message or of the context, in order."""
    from common.protocol import wire
    from common.protocol.versions import Step

    arrays = get_records(content, ArrayRecord)
    found = {int(key.removeprefix(_STEP)): r for key, r in arrays.items() if key.startswith(_STEP)}
    return [Step(number, wire.decode(found[number])) for number in sorted(found)]


def _gate(kind: str, context: Context) -> "Gate":
    """The gate for one message; the site file is read anew, so that a changed policy holds at once.

    Raises:
        ConfigError: the site file is wrong.
    """
    from client.privacy.guard import Gate

    site_file = _site_file(context)
    if not site_file.is_file():
        raise ConfigError(f"this SuperNode's --node-config must give {SITE_KEY!r}, the path of a site file")
    ledgers = context.node_config.get(LEDGERS_KEY)
    folder = None if ledgers is None else Path(str(ledgers))
    return Gate(load(site_file, SiteConfig), site_file, kind, context.run_id, folder)


def _site_file(context: Context) -> Path:
    return Path(str(context.node_config.get(SITE_KEY, "")))


def _session(site: SiteConfig, message: Message, context: Context) -> "Session":
    """The session of this site in this run; made once per process, and when the site file has changed.

    Raises:
        ConfigError: what the server sent is wrong.
    """
    from client.session import Session
    from client.shared_base import Bases

    site_file = _site_file(context)
    sent = _text(get_record(message.content, "config", ConfigRecord), "federation")
    key = (context.run_id, str(site_file), site.model_dump_json(), sent or "")
    if key not in _sessions:
        federation = _federation(sent)
        if site.trust is not None and VETTED not in os.environ:
            raise ConfigError(
                f"{site.name}: its site file has `trust`, but nobody has checked this bundle; "
                f"run fedspan site worker --site {site_file.name} beside a "
                f"SuperNode with --isolation process"
            )
        most = int(os.environ.get(SESSIONS, "1"))
        while len(_sessions) >= most:
            del _sessions[next(iter(_sessions))]  # the oldest
        bases = _bases.setdefault(context.run_id, Bases()) if most > 1 else None
        _sessions[key] = Session(site, site_file, federation, bases)
    return _sessions[key]


def _federation(sent: str | None) -> FederationConfig:
    import json

    try:
        data = json.loads(sent or "")
    except ValueError:
        raise ConfigError("the message holds no federation settings; is the server a FedSpan server?") from None
    return parse(data, FederationConfig, "federation settings from the server")


def _tensors(message: Message, context: Context) -> "dict[str, Tensor]":
    """Tensors that came with the message, and those kept from an earlier one."""
    from common.protocol import wire

    kept = get_record(context.state, _FROZEN, ArrayRecord)
    sent = message.content.get("arrays")
    if not isinstance(sent, ArrayRecord):
        raise WireError("the message has no 'arrays' record")
    return {**wire.decode(kept), **wire.decode(sent)}


def _each(content: RecordDict) -> "Iterator[tuple[str, Tensor]]":
    """Every tensor of a message, one at a time."""
    from common.protocol import wire

    for key, record in get_records(content, ArrayRecord).items():
        for part, array in record.items():
            for name, tensor in wire.decode({part: array}).items():
                yield name if key == "arrays" else f"{key}/{name}", tensor


def _names(request: ConfigRecord) -> list[str]:
    """The tensors that a message wants trained."""
    names = request.get("active", [])
    return [str(name) for name in names] if isinstance(names, list) else []


def _number(request: ConfigRecord) -> int | None:
    number = request.get("server-round")
    return number if isinstance(number, int) else None


def _text(record: ConfigRecord, key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) else None
