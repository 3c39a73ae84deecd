"""A round's work at a site, and its update in the form in which it travels, clipped and noised where asked."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.privacy.noise import norm_of, private
from client.site_model import SiteModel
from client.training.galore import GaLore
from client.training.inner import SecondMoments
from client.training.settings import make_optimizer
from client.training.trainer import schedule
from common.config.federation import FederationConfig
from common.config.site import PrivacyConfig
from common.linalg.subspace import projects_right
from common.model import second_moments
from common.model.families import in_head
from common.protocol.factors import Exchange, Factors, pack, packed_bytes, rounding_error
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


class Work:
    """One round. It is looked at as a whole before a row is touched.

    Args:
        model: the site's, in the state that the round begins with.
        federation: the federation's settings.
        privacy: the site's.
        server_round: from 1.
        active: names of the tensors that are trained and sent.
        rows: of the shard that are trained on.

    Attributes:
        server_round: as given.
        parameters: what is trained and sent, by name.
        mine: the same, and what is trained and stays.
        steps: optimizer steps.
    """

    def __init__(
        self,
        model: SiteModel,
        federation: FederationConfig,
        privacy: PrivacyConfig | None,
        server_round: int,
        active: list[str],
        rows: int,
    ) -> None:
        self._model, self._federation, self._privacy = model, federation, privacy
        self.server_round, self._active = server_round, active
        self.parameters = {name: model.tuned.parameters[name] for name in second_moments.without(active)}
        self.mine = self.parameters | model.tuned.local
        self.steps = federation.training.steps(rows)

    def begin(self, site: str) -> str:
        """Make the model ready for training; the seed of the order of rows, and already of dropout."""
        training = self._federation.training
        if training.gradient_checkpointing:
            self._model.tuned.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        seed = f"{training.seed}/{site}/{self.server_round}"
        torch.manual_seed(random.Random(seed).getrandbits(63))  # noqa: S311 - dropout
        return seed

    def optimizer(self) -> torch.optim.Optimizer:
        """A new one; of the tensors that are exchanged nothing else is trained.

        Raises:
            TrainingError: the settings do not fit the weights.
        """
        for name, parameter in self._model.tuned.parameters.items():
            parameter.requires_grad_(name in self.parameters)
        training, strategy, moments = self._federation.training, self._federation.strategy, self.second_moments()
        basis = self._model.exchange(self.server_round).basis if strategy.trains == "weights" else None
        return make_optimizer(self.mine, training, strategy, self.server_round, basis, moments)

    def second_moments(self) -> SecondMoments | None:
        """What the round begins with."""
        if self._federation.strategy.optimizer_state != "averaged":
            return None
        return SecondMoments(self._model.weights.tensors, (self.server_round - 1) * self.steps)

    def most_bytes(self) -> int:
        """Most bytes of the update's tensors; it depends on shapes and settings alone.

        Raises:
            TrainingError: see ``optimizer``.
        """
        self.optimizer()  # what is wrong with the settings is told before anything is charged
        strategy = self._federation.strategy
        if strategy.trains != "weights":
            return sum(p.numel() * (4 if strategy.changes_base else p.element_size()) for p in self.parameters.values())
        weights, exchange = self._model.weights.tensors, self._model.exchange(self.server_round)
        whole = {name: 4 * weights[name].numel() for name in self._active}
        if self._privacy is not None and exchange.basis is None:
            return sum(whole.values())
        directions = strategy.rank * strategy.bases(self.steps)
        factored = [name for name in self.parameters if not in_head(name)]
        return sum({**whole, **{n: packed_bytes(weights[n].shape, directions, exchange) for n in factored}}.values())

    def start(self) -> Tensors:
        """What the update will be relative to; GaLore notes the changes itself."""
        if self._federation.strategy.trains == "weights":
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def update(self, optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor]) -> Outgoing:
        """What leaves after training."""
        if isinstance(optimizer, GaLore):
            weights, exchange = self._model.weights.tensors, self._model.exchange(self.server_round)
            moments = self._federation.strategy.optimizer_state == "averaged"
            return changed_weights(optimizer, list(self.parameters), weights, exchange, self._privacy, moments=moments)
        # Beside base weights, which are federated in float32, factors are, too.
        in_float32 = self._federation.strategy.changes_base
        return trained_tensors(self.parameters, start, self._privacy, in_float32=in_float32)

    def nothing(self, start: Mapping[str, Tensor]) -> tuple[Outgoing, dict[str, float]]:
        """What leaves instead when training with `privacy` has failed: noise alone, in the form of an honest update.

        Names, shapes, types and factors are the same, and so are the decay of the weights and the numbers beside it:
        nobody can tell from what leaves that anything went wrong, and so not what rows would make it go wrong.
        """
        training, strategy = self._federation.training, self._federation.strategy
        factors = schedule(training, self.server_round, self._federation.rounds, self.steps)
        rates = [training.learning_rate * factor for factor in factors]
        numbers = {"steps": float(self.steps), "learning_rate": rates[-1]}
        for parameter in self.mine.values():
            parameter.grad = None
        if strategy.trains != "weights":
            return trained_tensors(start, start, self._privacy, in_float32=strategy.changes_base), numbers
        weights, decay = self._model.weights.tensors, 1.0
        for rate in rates:
            decay *= 1.0 - rate * training.weight_decay
        changes = {name: Factors(decay, [], common=True) for name in self.parameters if not in_head(name)}
        whole = {name: weights[name] for name in self.parameters if in_head(name)}
        return factored_weights(
            changes, whole, weights, self._model.exchange(self.server_round), self._privacy
        ), numbers
