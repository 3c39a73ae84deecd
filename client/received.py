"""Bring a site to the state in a request, and keep state in Flower's context for the site's next process.

Decision 003 explains which tensors a client keeps; decision 007 explains why they are kept in Flower's context.
"""

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
# Records of the context; records of steps have the same names as in messages.
_FROZEN = "frozen"  # tensors kept for the next message
_HELD, _VERSION = "held", "version"  # name of the version that the kept steps lead to


@dataclass(frozen=True)
class Held:
    """The state that a site promises to hold until the next message: a version, or frozen tensors, or nothing.

    Attributes:
        version: version of trained base weights.
        frozen_digest: digest of the tensors that the round does not train.
    """

    version: str | None = None
    frozen_digest: str | None = None


def receive(state: State, active: list[str], session: Session, gate: Gate, context: Context) -> Held:
    """Bring a session to a state.

    Args:
        state: the state in the request.
        active: names of the tensors that will be trained; empty for an evaluation.
        session: the site's session.
        gate: records the received tensors.
        context: Flower's context, with the records of earlier processes of this site.

    Raises:
        StaleStateError: this site lacks tensors that the state builds on; the server then resends everything.
        WireError: a tensor cannot be read, was not expected, or cannot be the result of training.
    """
    after, rounds = state.server_round - isinstance(state, TrainRequest), session.federation.rounds
    if not 0 <= after <= state.server_round <= rounds:
        raise WireError(f"this is a message of round {state.server_round}; allowed: up to {rounds}")
    sent, steps = _read(state, session)
    gate.receive({f"{STEP.format(s.server_round)}/{name}": t for s in steps for name, t in s.tensors.items()} | sent)
    weights = session.weights
    if weights is not None and state.since is not None and state.version is not None:
        catch_up(session, context)
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
    """Decode the tensors or steps in a request, after checking that they are not larger than the state."""
    weights, exchanged = session.weights, session.exchanged
    whole = {name: tensor.nbytes for name, tensor in exchanged.items()}
    if state.since is None or weights is None:
        if state.steps:
            raise WireError(f"steps came of rounds {', '.join(map(str, state.steps))[:80]}; allowed: none")
        return wire.decode(state.arrays, whole), []
    # With masked sums a site takes no whole weights, but all steps from the base model, however many
    times = 1 if session.federation.secure_aggregation is None else max(1, len(state.steps))
    came, most = state.num_bytes, times * sum(whole.values()) + len(state.steps) * wire.told_bytes(weights.most)
    if came > most or len(state.steps) > session.federation.rounds:
        raise WireError(f"{came} bytes came in {len(state.steps)} steps; allowed: up to {most} bytes, a step a round")
    wire.decode(state.arrays, {})
    return {}, [Step(number, wire.decode(state.steps[number], weights.most)) for number in sorted(state.steps)]


def catch_up(session: Session, context: Context) -> None:
    """In a new process: apply the steps that the last process has kept."""
    weights, held = session.weights, get_record(context.state, _HELD, ConfigRecord).get(_VERSION)
    if weights is not None and weights.version == weights.first and held is not None:
        session.follow(_steps(_kept_steps(context)), weights.first, str(held))


def _keep_steps(weights: Weights, sent: Mapping[int, ArrayRecord], context: Context) -> Held:
    """Keep the steps since the base model in the context, so that the site's next process can compute the weights.

    Steps, not weights: the context is in the SuperNode's memory, and ``Weights`` drops steps that are larger than the
    weights. A site without kept steps is sent the weights again (decisions 003, 005, 007).
    """
    wanted = {step.server_round: step for step in weights.steps or []}
    there = _kept_steps(context)
    for number in there.keys() - wanted.keys():
        del context.state[STEP.format(number)]
    for number in wanted.keys() - there.keys():  # as received; a step that only this process had is encoded again
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
    """Decode the steps in records, in the order of rounds."""
    return [Step(number, wire.decode(records[number])) for number in sorted(records)]
