"""What leaves of a round's training: the update in the form in which it travels, clipped and noised where asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.privacy.noise import norm_of, private
from client.training.galore import GaLore
from common.config.site import PrivacyConfig
from common.linalg.subspace import projects_right
from common.model import second_moments
from common.model.families import in_head
from common.protocol.factors import Exchange, Factors, pack, rounding_error
from common.protocol.tensors import Tensors


@dataclass(frozen=True)
class Outgoing:
    """An update, ready to leave.

    Attributes:
        tensors: what travels.
        norm: L2 norm of the whole change, as it leaves.
        wire_error: relative error of rounded factors; None where nothing is rounded.
    """

    tensors: Tensors
    norm: float
    wire_error: float | None = None


def trained_tensors(
    trained: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    privacy: PrivacyConfig | None,
    *,
    in_float32: bool = False,
) -> Outgoing:
    """Tensors that travel whole.

    Args:
        trained: after training, by name.
        received: the same before it.
        privacy: None: they leave as they are.
        in_float32: whatever type they were trained in.
    """
    changes = {name: tensor.detach().cpu().float() - received[name].float() for name, tensor in trained.items()}
    if privacy is None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}
    else:
        changes = private(changes, privacy)
        tensors = {name: (received[name].float() + change).to(trained[name].dtype) for name, change in changes.items()}
    if in_float32:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return Outgoing(tensors, norm_of(changes.values()))


def changed_weights(
    optimizer: GaLore,
    names: Sequence[str],
    start: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: PrivacyConfig | None,
    *,
    moments: bool,
) -> Outgoing:
    """Base weights that GaLore trained: those that it projected as a change in factors, a head whole.

    Args:
        optimizer: after training.
        names: of all that it trained and that is exchanged.
        start: what they were before, by name.
        exchange: how factors travel.
        privacy: None: the exact change leaves.
        moments: whether Adam's second moments leave, too.
    """
    changes = {name: optimizer.factors(name) for name in names if not in_head(name)}
    whole = {name: optimizer.whole(name, start[name]) for name in names if in_head(name)}
    update = factored_weights(changes, whole, start, exchange, privacy)
    if not moments:
        return update
    sent = {second_moments.name_of(name): optimizer.second_moment(name) for name in changes}
    return replace(update, tensors=update.tensors | sent)


def factored_weights(
    changes: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: PrivacyConfig | None,
) -> Outgoing:
    """Weights that travel as a change in factors, and others beside them that travel whole.

    With ``privacy`` all of it is clipped jointly and noised, but for the factors' decay, which follows from the
    federation file and the number of rows. Under a shared basis it is the numbers R beside it that are noised and
    leave. An own basis comes from the gradients, so it must not leave: the product is made, noised, and travels whole.

    Args:
        changes: of every weight that was projected.
        whole: the others, after training, in float32 on the CPU.
        start: the weights that both are relative to.
        exchange: how factors travel.
        privacy: None: the exact change leaves.
    """
    moved = {name: tensor - start[name] for name, tensor in whole.items()}
    if privacy is not None and exchange.basis is None:
        terms = {name: Factors(1.0, change.terms).change(start[name]) for name, change in changes.items()}
        noised = private(terms | moved, privacy)
        decays = {name: change.decay for name, change in changes.items()}
        tensors = {name: term.add_(start[name], alpha=decays.get(name, 1.0)) for name, term in noised.items()}
        return Outgoing(tensors, norm_of(tensor - start[name] for name, tensor in tensors.items()))
    if privacy is not None:
        changes, moved = _noised_in_basis(changes, moved, start, exchange, privacy)
        whole = {name: start[name] + change for name, change in moved.items()}
    tensors = {k: t for n, change in changes.items() for k, t in pack(n, change, start[n], exchange).items()}
    tensors |= whole
    norm = math.hypot(norm_of(moved.values()), *(change.square(start[name]) ** 0.5 for name, change in changes.items()))
    if exchange.precision == "float32":
        return Outgoing(tensors, norm)
    shapes = {name: tuple(start[name].shape) for name in changes}
    return Outgoing(tensors, norm, rounding_error(changes, shapes, exchange))


def _noised_in_basis(
    changes: Mapping[str, Factors],
    moved: Tensors,
    start: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: PrivacyConfig,
) -> tuple[dict[str, Factors], Tensors]:
    """The changes in the round's shared bases P, which every machine draws by itself, and those of whole tensors.

    Only R is data. P's rows (columns) are orthonormal, so R has the norm of P R.
    """
    assert exchange.basis is not None  # noqa: S101 - the caller has looked
    numbers, bases = {}, {}
    for name, change in changes.items():
        shape = tuple(start[name].shape)
        right, rank = projects_right(shape), exchange.basis.rank
        bases[name] = exchange.basis(name, shape)
        sums = [(a if right else b).cpu() for a, b in change.terms]  # one, or none when the weight got no gradient
        numbers[name] = sum(sums, torch.zeros((shape[0], rank) if right else (rank, shape[1])))
    noised, result = private(numbers | moved, privacy), {}
    for name, change in changes.items():
        pair = (noised[name], bases[name]) if projects_right(start[name].shape) else (bases[name], noised[name])
        result[name] = Factors(change.decay, [pair], common=True)
    return result, {name: noised[name] for name in moved}
