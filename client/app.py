"""The Flower ClientApp of a site: receives a message, lets the session work, replies.

Heavy modules are imported only when a message has arrived. ``common.errors`` decides how much of an error leaves the
site; the text of an error that may quote a row never does.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError, FedSpanError, PolicyError, StaleStateError, place_of
from common.protocol.exchanges import ACTION, ExchangeReply, ExchangeRequest, MaskedTrainReply, MaskedTrainRequest
from common.protocol.messages import (
    ARRAYS,
    DeliverReply,
    DeliverRequest,
    EvaluateReply,
    EvaluateRequest,
    Failure,
    Hello,
    HelloRequest,
    TrainReply,
    TrainRequest,
)
from common.protocol.records import get_records
from common.system import logs

if TYPE_CHECKING:
    from torch import Tensor

    from client.privacy.agreement import Agreement
    from client.privacy.guard import Gate
    from client.progress import Progress
    from client.session import Session
    from client.site import Site
    from client.site_model import Bases
    from common.protocol.tensors import Tensors

app = ClientApp()

SITE_KEY = "site"  # node-config key: path of the site file
AGREEMENTS_KEY = "agreements"  # node-config key that a launcher sets for its own sites: file with their agreements
IDENTITY_KEY = "identity"  # node-config key: file with the site's registered private key, for masked sums
LEDGERS_KEY = "ledgers"  # node-config key that an experiment's trial sets: folder for ledgers, not the site file's
VETTED = "FEDSPAN_VETTED"  # environment variable: the site's worker found that the site trusts this bundle
SESSIONS = "FEDSPAN_SESSIONS"  # environment variable: number of sites that this process may hold at a time; default 1
_sessions: dict[tuple[int, str, str, str], "Session"] = {}  # by run, because files may change between runs
_progress: dict[str, "Progress"] = {}  # by site file
_bases: dict[int, "Bases"] = {}  # base models shared by the sites of this process, by run; empty for a single site


Request = TypeVar("Request", bound=HelloRequest)
Reply = TypeVar("Reply", Hello, TrainReply, EvaluateReply, ExchangeReply, MaskedTrainReply, DeliverReply)


def _answering(
    kind: type[Request], handler: "Callable[[Site, Request], Reply]", name: str | None = None
) -> Callable[[Message, Context], Message]:
    """Make a function for Flower from a handler: reads the request, sends the handler's reply or its error.

    Args:
        kind: the request's class.
        handler: makes the reply.
        name: the message's name in the ledger; None: the handler's.
    """

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        gate: Gate | None = None
        progress = _of_site(context)
        known: dict[str, object] = {"run": str(context.run_id), "event": message.metadata.message_type}
        progress.known = known
        try:
            logs.configure("site")
            started = time.time()
            gate = _gate(name or handler.__name__, context)
            known["site"] = gate.site.name
            request = kind.read(message.content)
            known["round"] = number = getattr(request, "server_round", None)
            agreement = gate.agreed(request)
            progress.begin(context.run_id, agreement.federation, name or handler.__name__, number, request.run)
            site = _site(gate, agreement, context, progress)
            site.session.on_step = progress.step
            gate.check(site.session.federation, request)
            gate.check_rows(site.session.train_rows)
            reply = handler(site, request)
            clock = {"started": started, "finished": time.time()}
            content = gate.shared(replace(reply, seconds=site.session.seconds(), clock=clock)).to_record()
            own = site.session
            gate.admit(_each(content), _told(content), own.train_rows, own.update_norm, own.aside)
            progress.end(
                sum(len(a.data) for record in get_records(content, ArrayRecord).values() for a in record.values())
            )
        except Exception as error:  # noqa: BLE001 - whatever happens at a site, the operator gets an answer
            failure = _failure(error, gate)
            event = "refused" if isinstance(error, PolicyError) else "failed"
            event = "not yet" if isinstance(error, StaleStateError) else event
            progress.refuse(failure.reason, event, None if isinstance(error, FedSpanError) else error)
            return Message(failure.to_error(), reply_to=message)
        return Message(content, reply_to=message)

    return answer


def _failure(error: Exception, gate: "Gate | None") -> Failure:
    """The answer for the operator about an error; for errors that are not FedSpan's own, type and place only."""
    if isinstance(error, FedSpanError):
        failure = Failure.of(error)
    else:
        reason = f"{place_of(error)}; the site's log says more"
        failure = Failure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    return failure if gate is None else gate.refuse(error, failure)


def hello(site: "Site", request: HelloRequest) -> Hello:
    """Answer a hello request: the site's name, digests of its base model, its noise."""
    del request
    found = site.session.hello()
    site.progress.ready(found.train_rows, found.held_out_rows, found.device)
    return found


def train(site: "Site", request: TrainRequest) -> TrainReply:
    """Evaluate the received state, if the request asks for that; train; reply with the active tensors.

    The request is checked completely before it is charged. After the charge, a site with `privacy` always replies with
    an update, even if its rows make training fail.
    """
    from common.protocol import wire

    if site.session.federation.secure_aggregation is not None:
        raise PolicyError("this site has agreed to `secure_aggregation`: its update leaves masked, or not at all")
    held = site.receive(request, request.active)
    most = site.session.work(request.server_round, request.active).most_bytes()
    tensors, told = _trained(site, request, most)
    return TrainReply(arrays=wire.encode(tensors, bundled=True), **vars(held), **told)


def masked_train(site: "Site", request: MaskedTrainRequest) -> MaskedTrainReply:
    """Train as ``train`` does; reply with masked numbers, which nobody can read but as a part of the sites' sum."""
    from common.protocol import wire

    site.gate.note(masked=True)
    held = site.receive(request, request.active)
    most = site.session.work(request.server_round, request.active).most_bytes()
    part = site.member.part(request, site.session)
    tensors, told = _trained(site, request, max(most, part.most_bytes))
    masked, weight, clipped = part.masked(tensors)
    told["training"] |= {"clipped": clipped}
    told |= {"weight": weight, "next_keys": site.member.keys_ahead(request, site.unmasked)}
    return MaskedTrainReply(arrays=wire.encode(masked, bundled=True), **vars(held), **told)


def exchange(site: "Site", request: ExchangeRequest) -> ExchangeReply:
    """Take part in one of the exchanges of keys, shares and signatures that go with a masked sum."""
    site.gate.note(stage=request.stage)
    site.progress.say(f"{request.stage} of the masked sum")
    answer = site.member.exchange(request, site.unmasked)
    return ExchangeReply(payload=answer, ahead=site.member.share_ahead(request.ahead))


def _trained(site: "Site", request: TrainRequest, most_bytes: int) -> tuple["Tensors", dict[str, Any]]:
    """Charge a request that is checked, evaluate, train; the update, and the reply's fields beside it."""
    from client.delivery import hold

    scored = site.gate.charge(most_bytes, site.session.scored_rows if request.evaluate else 0)
    hold(request, site.session, site.models(request))
    scores = site.session.evaluate() if scored else {}
    if scores:
        site.progress.scored(request.server_round - 1, scores)
    tensors, numbers = site.session.train(request.server_round, request.active)
    site.progress.trained(numbers)
    site.own(request).keep(request.server_round, site.session.kept, request.best)
    rows, alpha = site.session.train_rows, site.session.lora_alpha
    told = {"server_round": request.server_round, "num_examples": rows, "lora_alpha": alpha}
    return tensors, {**told, "training": numbers, "scores": scores}


def evaluate(site: "Site", request: EvaluateRequest) -> EvaluateReply:
    """Evaluate the last round's state, within the limits on evaluations and held-out rows."""
    site.member.forget()
    if site.gate.site.keep is None:  # else the model comes next
        site.progress.ended(request.server_round)
    site.receive(request, [])
    scored = site.gate.charge(0, site.session.scored_rows)
    scores = site.session.evaluate() if scored else {}
    site.progress.scored(request.server_round, scores) if scores else site.progress.say("no scores leave")
    return EvaluateReply(scores=scores)


def deliver(site: "Site", request: DeliverRequest) -> DeliverReply:
    """Write the federation's model; only its digest leaves."""
    from client import delivery

    models = site.models(request)
    reply, folder = delivery.deliver(request, site.session, site.gate, site.own(request), models, site.context)
    site.progress.ended(request.server_round, folder, reply.reason)
    return reply


app.query()(_answering(HelloRequest, hello))
app.query("deliver")(_answering(DeliverRequest, deliver))
app.train()(_answering(TrainRequest, train))
app.evaluate()(_answering(EvaluateRequest, evaluate))
app.query(ACTION)(_answering(ExchangeRequest, exchange))
app.train(ACTION)(_answering(MaskedTrainRequest, masked_train, "train"))


def _gate(kind: str, context: Context) -> "Gate":
    """Make the gate for one message; it reads the site file again, so that a changed policy holds at once.

    Raises:
        ConfigError: the site file is wrong.
    """
    from client.privacy.guard import Gate

    site_file = _site_file(context)
    if not site_file.is_file():
        raise ConfigError(f"this SuperNode's --node-config must give {SITE_KEY!r}, the path of a site file")
    agreements, ledgers = (_path(context, key) for key in (AGREEMENTS_KEY, LEDGERS_KEY))
    return Gate(load(site_file, SiteConfig), site_file, kind, context.run_id, agreements, ledgers)


def _of_site(context: Context) -> "Progress":
    from client.progress import Progress

    file = str(_site_file(context))
    if file not in _progress:
        _progress[file] = Progress.of_process()
    return _progress[file]


def _site(gate: "Gate", agreement: "Agreement", context: Context, progress: "Progress") -> "Site":
    """The parts that answer a message whose settings the site has agreed to."""
    from client.masked import Member
    from client.site import Site

    identity = _path(context, IDENTITY_KEY)
    member = Member(gate.site.name, context.run_id, agreement, identity, gate.site.privacy)
    return Site(_session(gate.site, agreement, context), gate, context, progress, member)


def _site_file(context: Context) -> Path:
    return _path(context, SITE_KEY) or Path()


def _path(context: Context, key: str) -> Path | None:
    """A path in the node config."""
    return None if (path := context.node_config.get(key)) is None else Path(str(path))


def _session(site: SiteConfig, agreement: "Agreement", context: Context) -> "Session":
    """The session of this site in this run; made once per process, and again when a file has changed.

    Raises:
        ConfigError: the site file has ``trust``, but no worker has verified this bundle.
    """
    from client.session import Session
    from client.site_model import Bases

    site_file = _site_file(context)
    key = (context.run_id, str(site_file), site.model_dump_json(), agreement.digest)
    if key not in _sessions:
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
        _sessions[key] = Session(site, site_file, agreement.federation, bases)
    return _sessions[key]


def _each(content: RecordDict) -> "Iterator[tuple[str, Tensor]]":
    """The tensors in a reply, decoded one at a time."""
    from common.protocol import wire

    for key, record in get_records(content, ArrayRecord).items():
        for part, array in record.items():
            for name, tensor in wire.decode({part: array}).items():
                yield name if key == ARRAYS else f"{key}/{name}", tensor


def _told(content: RecordDict) -> list[str]:
    """Names of all other values in a reply."""
    return sorted({name for part in content.values() if not isinstance(part, ArrayRecord) for name in part})
