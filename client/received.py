"""The state that a request brings a site to, and what Flower's context keeps of it for the site's next process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Context

from client.held_weights import Weights
from client.privacy.guard import Gate
from client.session import Session
from common.errors import WireError
from common.protocol import wire
from common.protocol.messages import STEP, State, TrainRequest
from common.protocol.records import get_record, get_records
from common.protocol.tensors import Tensors
from common.protocol.versions import Step

LONG_LIVED = "FEDSPAN_WORKER"  # environment variable: this process answers more than one message
# Records of the context, beside those of steps, which have the names that they have in messages.
_FROZEN = "frozen"  # tensors kept for the next message
_HELD, _VERSION = "held", "version"  # names the version of the weights that the steps lead to
_KEPT = "kept"  # what never leaves the site: a local head, optimizer moments


@dataclass(frozen=True)
class Held:
    """What a site holds from now on, as the server may count on it: one of the two, or nothing.

    Attributes:
        version: of trained base weights.
        frozen_digest: of the tensors that the round does not train.
    """

    version: str | None = None
    frozen_digest: str | None = None


def receive(state: State, active: list[str], session: Session, gate: Gate, context: Context) -> Held:
    """Bring a session to a state.

    Args:
        state: that came.
        active: names of the tensors that will be trained; none to evaluate.
        session: the site's.
        gate: takes note of all tensors that came.
        context: what an earlier process of this site has left.

    Raises:
        StaleStateError: this site lacks what the state builds on.
        WireError: a tensor cannot be read, was not to come, or is not what training can have made.
    """
    session.kept = wire.decode(get_record(context.state, _KEPT, ArrayRecord))
    after, rounds = state.server_round - isinstance(state, TrainRequest), session.federation.rounds
    if not 0 <= after <= state.server_round <= rounds:
        raise WireError(f"this is a message of round {state.server_round}; allowed: up to {rounds}")
    sent, steps = _read(state, session)
    gate.receive({f"{STEP.format(s.server_round)}/{name}": t for s in steps for name, t in s.tensors.items()} | sent)
    weights = session.weights
    if weights is not None and state.since is not None and state.version is not None:
        held = get_record(context.state, _HELD, ConfigRecord).get(_VERSION)
        if weights.version == weights.first and held is not None:  # a new process goes on where the last one was
            session.follow(_steps(_kept_steps(context)), weights.first, str(held))
        session.follow(steps, state.since, state.version)
        return _keep_steps(session.weights or weights, state.steps, context)
    kept = wire.decode(get_record(context.state, _FROZEN, ArrayRecord))
    frozen = session.set_state({**kept, **sent}, state.frozen_digest, active, state.version or "unknown", after)
    if weights is not None:
        return _keep_steps(weights, state.steps, context)
    if active:
        context.state[_FROZEN] = wire.encode(frozen)
    return Held(frozen_digest=state.frozen_digest if frozen else None)


def _read(state: State, session: Session) -> tuple[Tensors, list[Step]]:
    """What came, in full or in steps, once it is seen to be no larger than the state."""
    weights, exchanged = session.weights, session.exchanged
    whole = {name: tensor.nbytes for name, tensor in exchanged.items()}
    if state.since is None or weights is None:
        if state.steps:
            raise WireError(f"steps came of rounds {', '.join(map(str, state.steps))[:80]}; allowed: none")
        return wire.decode(state.arrays, whole), []
    came, most = state.num_bytes, sum(whole.values()) + len(state.steps) * wire.told_bytes(weights.most)
    if came > most or len(state.steps) > session.federation.rounds:
        raise WireError(f"{came} bytes came in {len(state.steps)} steps; allowed: up to {most} bytes, a step a round")
    wire.decode(state.arrays, {})
    return {}, [Step(number, wire.decode(state.steps[number], weights.most)) for number in sorted(state.steps)]


def keep(tensors: Tensors, context: Context) -> None:
    """Leave what never leaves the site to its next process."""
    context.state[_KEPT] = wire.encode(tensors)


def _keep_steps(weights: Weights, sent: Mapping[int, ArrayRecord], context: Context) -> Held:
    """Let the next process make the weights again from the base model, as long as that takes little to keep."""
    wanted = {step.server_round: step for step in weights.steps or []}
    there = _kept_steps(context)
    for number in there.keys() - wanted.keys():
        del context.state[STEP.format(number)]
    for number in wanted.keys() - there.keys():  # as it has just come; of before, when only this process has it
        record = sent[number] if number in sent else wire.encode(wanted[number].tensors, bundled=True)
        context.state[STEP.format(number)] = record
    context.state.pop(_HELD, None)
    if weights.steps is not None:
        context.state[_HELD] = ConfigRecord({_VERSION: weights.version})
    return Held(version=weights.version if weights.steps is not None or LONG_LIVED in os.environ else None)


def _kept_steps(context: Context) -> dict[int, ArrayRecord]:
    """The records of steps in the context, by round."""
    prefix = STEP.partition("{")[0]
    arrays = get_records(context.state, ArrayRecord)
    return {int(key.removeprefix(prefix)): record for key, record in arrays.items() if key.startswith(prefix)}


def _steps(records: Mapping[int, ArrayRecord]) -> list[Step]:
    """Steps of their records, in order."""
    return [Step(number, wire.decode(records[number])) for number in sorted(records)]
