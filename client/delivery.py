"""Write the federation's model at the site, from what the site holds, if it has the digest that the server tells.

The bytes are the server's own: the same tensors, written by the same code (``common.model.finished``). A site that
lacks the tensors says so, and is sent them.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flwr.app import Context
from torch import Tensor

from client.kept.models import KeptModels
from client.kept.own_tensors import OwnTensors
from client.privacy.guard import Gate
from client.reach import Reach
from client.received import catch_up, receive
from client.session import Session
from common.errors import StaleStateError, WireError
from common.model import second_moments
from common.model.adapters import LORA_A, LORA_B
from common.model.card import Card, read_told
from common.model.finished import About, Use
from common.protocol import wire
from common.protocol.digest import tensors_digest
from common.protocol.messages import DeliverReply, DeliverRequest, TrainRequest
from common.protocol.tensors import Tensors
from common.text import size

log = logging.getLogger("site")
_SPARE = 50_000_000  # bytes that stay free: the ledger and the log go on


def deliver(
    request: DeliverRequest, session: Session, gate: Gate, own: OwnTensors, models: KeptModels | None, context: Context
) -> tuple[DeliverReply, Path | None]:
    """Write the model that a request names, and beside it the site's personal one if the strategy makes such.

    Returns:
        The reply; the model's folder, None: it is not written.

    Raises:
        StaleStateError: the site does not hold the tensors of this round; the server then sends them.
        WireError: the sent tensors cannot be read, or training cannot have made them; or the card is of another model.
    """
    about = _told(request.about, session)
    if (keep := session.site.keep) is None or models is None:
        return DeliverReply(reason="it keeps no model (`keep` in its site file)"), None
    every = f"round-{about.card.round:03}" if keep.when == "every" else "model"
    name = "best" if "best" in (keep.when, about.card.chosen) else every
    try:
        digest = models.digest(name, about.card.trained_digest)
        personal = bool(session.model.tuned.local)
        if digest is None or personal:
            tensors = _tensors(request, about.card, session, gate, models, context)
            digest = _write(models, name, tensors, about, session)
        if personal:
            use = Use.of(session.federation, session.site.data)  # the server may know no rows like this site's
            mine = About(use=use, card=about.card.model_copy(update={"personal": True}))
            _write(models, "personal", tensors, mine, session, own.after(about.card.round))
        models.let_go()
    except OSError as error:
        log.error("the model cannot be written: %s", error)
        return DeliverReply(reason=f"the model cannot be written ({error.strerror or type(error).__name__})"), None
    return DeliverReply(files=digest), models.folder / name


def hold(request: TrainRequest, session: Session, models: KeptModels | None) -> None:
    """Hold the state that a round starts from, as the site file asks: each round's model, or what may be the best.

    A state that the kept steps lead to is not held. When the steps get too large and are dropped, the best round before
    that is lost; if it stays the best, the site is sent it again.
    """
    after, keep = request.server_round - 1, session.site.keep
    if keep is None or models is None or after == 0 or (tensors := _current(session)) is None:
        return
    try:
        if keep.when == "every" and request.about is not None:
            about = _told(request.about, session)
            name = f"round-{about.card.round:03}"
            if about.card.round == after and models.digest(name, about.card.trained_digest) is None:
                if _digest(tensors) == about.card.trained_digest:
                    _write(models, name, tensors, about, session)
                    session.refill()
                else:
                    log.warning("the model of round %d is not kept: this site does not hold all of it", after)
        elif keep.when == "best" and (session.weights is None or session.weights.steps is None):
            _check_room(models, session)
            models.hold(after, tensors, request.best)
    except OSError as error:
        log.error("the state of round %d is not kept: %s", after, error)


def _write(
    models: KeptModels,
    name: str,
    tensors: Mapping[str, Tensor],
    about: About,
    session: Session,
    own: Mapping[str, Tensor] | None = None,
) -> str:
    """Write one model; returns the digest of its files.

    Raises:
        OSError: there is no room, or it cannot be written.
    """
    _check_room(models, session)
    models.base = session.model.source

    def make(folder: Path) -> None:
        session.model.write(folder, tensors, about, own or {})

    return models.write(name, about.card.round, about.card.trained_digest, make)


def _check_room(models: KeptModels, session: Session) -> None:
    """Raise an OSError when the disk has no room for one more model, or for a state, which is no larger."""
    there = next(one for one in (models.folder, *models.folder.parents) if one.is_dir())
    need = session.model.written_bytes
    if shutil.disk_usage(there).free < need + _SPARE:
        raise OSError(0, f"no room: it takes {size(need)}")


def _told(text: str, session: Session) -> About:
    """The facts about a model, if they are of the federation that this site has agreed to.

    So a site writes no more models than the agreement has rounds, and none that says that it is another one's.

    Raises:
        WireError: they cannot be read, or are not.
    """
    about, agreed = read_told(text, About), session.federation
    card = about.card
    facts: dict[str, tuple[object, object]] = {
        "federation": (card.federation, agreed.name),
        "task": (card.task, agreed.task),
        "strategy": (card.strategy, agreed.strategy),
        "rounds": (card.rounds, agreed.rounds),
    }
    for key, (told, known) in facts.items():
        if told != known:
            raise WireError(f"the model card's `{key}` is not that of the federation that this site has agreed to")
    return about


def _tensors(
    request: DeliverRequest, card: Card, session: Session, gate: Gate, models: KeptModels, context: Context
) -> Tensors:
    """The tensors that a card is about.

    Raises:
        StaleStateError: the site does not hold them.
        WireError: the sent tensors cannot be read, or training cannot have made them.
    """
    for tensors in _possible(request, card, session, gate, models, context):
        if _digest(tensors) == card.trained_digest:
            return tensors
    raise StaleStateError(f"this site does not hold the model of round {card.round}; send it in full")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return tensors_digest({name: tensors[name] for name in second_moments.without(tensors)})


def _possible(
    request: DeliverRequest, card: Card, session: Session, gate: Gate, models: KeptModels, context: Context
) -> Iterator[Tensors]:
    """The sent tensors; else the states that the site holds and that may be the one."""
    if request.num_bytes or request.since is not None:
        if request.since is None and session.model.is_cut:
            yield _whole(request, session, gate)
        else:
            receive(request, [], session, gate, context)
            yield _current(session) or {}
        return
    catch_up(session, context)
    weights = session.weights
    if weights is not None and request.version is not None:
        reached, steps = weights.first, weights.steps or []
        names = [reached := step.next(reached) for step in steps]
        if request.version in names[:-1]:
            session.follow(steps[: names.index(request.version) + 1], weights.first, request.version)
            weights = session.weights
        if weights is not None and weights.version == request.version:
            yield weights.tensors
    elif (current := _current(session)) is not None:
        yield current
    if (held := models.held(card.round)) is not None:
        yield held


def _current(session: Session) -> Tensors | None:
    """The federation's state that the site holds; None: only a part of it, or none since its process started."""
    return session.model.known.last if session.weights is None else session.weights.tensors


def _whole(request: DeliverRequest, session: Session, gate: Gate) -> Tensors:
    """A state in the federation's rank, sent to a site that trains with a smaller one: it is written, never trained."""
    rank = session.federation.strategy.rank
    like = {}
    for name, tensor in session.exchanged.items():
        rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
        shape = (rank, columns) if name.endswith(LORA_A) else (rows, rank) if name.endswith(LORA_B) else tensor.shape
        like[name] = tensor.new_empty(shape, device="meta")
    tensors = wire.decode(request.arrays, {name: tensor.nbytes for name, tensor in like.items()})
    gate.receive(tensors)
    Reach(session.federation, session.train_rows).check_like(tensors, like)
    if missing := like.keys() - tensors.keys():
        raise WireError(f"{min(missing)} is missing in the model")
    return tensors
